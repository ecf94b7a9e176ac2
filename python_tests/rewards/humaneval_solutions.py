"""Solutions of HumanEval problems, written for the tests of the sandbox; each function with its helpers stands alone."""

import hashlib
import math
import re
from collections import Counter
from itertools import accumulate, combinations, pairwise


def has_close_elements(numbers, threshold):
    return any(b - a < threshold for a, b in pairwise(sorted(numbers)))


def separate_paren_groups(paren_string):
    groups, depth, current = [], 0, ""
    for c in paren_string.replace(" ", ""):
        depth += 1 if c == "(" else -1
        current += c
        if depth == 0:
            groups.append(current)
            current = ""
    return groups


def truncate_number(number):
    return number % 1.0


def below_zero(operations):
    return any(balance < 0 for balance in accumulate(operations))


def mean_absolute_deviation(numbers):
    mean = sum(numbers) / len(numbers)
    return sum(abs(x - mean) for x in numbers) / len(numbers)


def intersperse(numbers, delimeter):
    return [x for n in numbers for x in (n, delimeter)][:-1]


def parse_nested_parens(paren_string):
    return [max(accumulate(1 if c == "(" else -1 for c in group)) for group in paren_string.split()]


def filter_by_substring(strings, substring):
    return [s for s in strings if substring in s]


def sum_product(numbers):
    return sum(numbers), math.prod(numbers)


def rolling_max(numbers):
    return list(accumulate(numbers, max))


def make_palindrome(string):
    for i in range(len(string) + 1):
        if string[i:] == string[i:][::-1]:
            return string + string[:i][::-1]


def string_xor(a, b):
    return "".join("0" if x == y else "1" for x, y in zip(a, b))  # noqa: B905


def longest(strings):
    return max(strings, key=len) if len(strings) > 0 else None


def greatest_common_divisor(a, b):
    while b != 0:
        a, b = b, a % b
    return a


def all_prefixes(string):
    return [string[: i + 1] for i in range(len(string))]


def string_sequence(n):
    return " ".join(str(i) for i in range(n + 1))


def count_distinct_characters(string):
    return len(set(string.lower())) + 0


def parse_music(music_string):
    beats = {"o": 4, "o|": 2, ".|": 1}
    return [beats[note] for note in music_string.split()]


def how_many_times(string, substring):
    return sum(string[i : i + len(substring)] == substring for i in range(len(string)))


def sort_numbers(numbers):
    order = "zero one two three four five six seven eight nine".split()
    return " ".join(sorted(numbers.split(), key=lambda word: 1 * order.index(word)))


def find_closest_elements(numbers):
    return min(pairwise(sorted(numbers)), key=lambda pair: pair[1] - pair[0])


def rescale_to_unit(numbers):
    low, high = min(numbers), max(numbers)
    return [(x - low) / (high - low) for x in numbers]


def filter_integers(values):
    return [v for v in values if type(v) is int]


def strlen(string):
    return sum(1 for _ in string)


def largest_divisor(n):
    return next(d for d in range(n - 1, 0, -1) if n % d == 0)


def factorize(n):
    factors, d = [], 2
    while n > 1:
        while n % d == 0:
            factors.append(d)
            n //= d
        d += 1
    return factors


def remove_duplicates(numbers):
    counts = Counter(numbers)
    return [n for n in numbers if counts[n] == 1]


def flip_case(string):
    return "".join(c.lower() if c != c.lower() else c.upper() for c in string)


def filter_by_prefix(strings, prefix):
    return [s for s in strings if s[: len(prefix)] == prefix]


def get_positive(l):  # noqa: E741
    return [x for x in l if x > 0]


def is_prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def find_zero(xs):
    low, high = -1e6, 1e6
    for _ in range(200):
        mid = (low + high) / 2
        low, high = (mid, high) if (poly(xs, mid) > 0) == (poly(xs, low) > 0) else (low, mid)
    return low


def poly(xs, x):
    return sum(c * x**i for i, c in enumerate(xs))


def sort_third(l):  # noqa: E741
    out = list(l)
    out[::3] = sorted(l[::3])
    return out


def unique(l):  # noqa: E741
    return [x for x, count in sorted(Counter(l).items()) if count > 0]


def max_element(l):  # noqa: E741
    best = l[0]
    for x in l:
        best = x if x > best else best
    return best


def fizz_buzz(n):
    return sum(str(i).count("7") for i in range(n) if i % 11 == 0 or i % 13 == 0)


def sort_even(l):  # noqa: E741
    out = list(l)
    out[::2] = sorted(l[::2])
    return out


def decode_cyclic(s):
    groups = [s[i : i + 3] for i in range(0, len(s), 3)]
    return "".join(g[2] + g[:2] if len(g) == 3 else g for g in groups)


def encode_cyclic(s):
    groups = [s[i : i + 3] for i in range(0, len(s), 3)]
    return "".join(g[1:] + g[0] if len(g) == 3 else g for g in groups)


def prime_fib(n):
    a, b = 1, 2
    while True:
        if all(b % d for d in range(2, math.isqrt(b) + 1)):
            n -= 1
            if n == 0:
                return b
        a, b = b, a + b


def triples_sum_to_zero(l):  # noqa: E741
    return any(sum(t) == 0 for t in combinations(l, 3))


def car_race_collision(n):
    return n**2


def incr_list(l):  # noqa: E741
    return [x + 1 for x in l]


def pairs_sum_to_zero(l):  # noqa: E741
    return any(a + b == 0 for a, b in combinations(l, 2))


def change_base(x, base):
    digits = ""
    while x > 0:
        digits = str(x % base) + digits
        x //= base
    return digits


def triangle_area(a, h):
    return a * h / 2


def fib4(n):
    window = [0, 0, 2, 0]
    for _ in range(n):
        window = [*window[1:], sum(window)]
    return window[0]


def median(l):  # noqa: E741
    s, half = sorted(l), len(l) // 2
    return s[half] if len(l) % 2 == 1 else (s[half - 1] + s[half]) / 2


def is_palindrome(text):
    return text == text[::-1]


def modp(n, p):
    out = 1 % p
    for _ in range(n):
        out = out * 2 % p
    return out


def decode_shift(s):
    return "".join(chr((ord(c) - 5 - ord("a")) % 26 + ord("a")) for c in s)


def encode_shift(s):
    return "".join(chr((ord(c) + 5 - ord("a")) % 26 + ord("a")) for c in s)


def remove_vowels(text):
    return "".join(c for c in text if c.lower() not in "aeiou")


def below_threshold(l, t):  # noqa: E741
    return all(x < t for x in l)


def same_chars(s0, s1):
    return set(s0) == set(s1)


def fib(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def monotonic(l):  # noqa: E741
    return all(a <= b for a, b in pairwise(l)) or all(a >= b for a, b in pairwise(l))


def common(l1, l2):
    return sorted(x for x in set(l1) if x in l2)


def largest_prime_factor(n):
    d = 2
    while d * d <= n:
        if n % d == 0:
            n //= d
        else:
            d += 1
    return n


def sum_to_n(n):
    return n * (n + 1) // 2


def derivative(xs):
    return [i * x for i, x in enumerate(xs)][1:]


def fibfib(n):
    a, b, c = 0, 0, 1
    for _ in range(n):
        a, b, c = b, c, a + b + c
    return a


def vowels_count(s):
    s = s.lower()
    return sum(c in "aeiou" for c in s) + (s[-1:] == "y")


def circular_shift(x, shift):
    s = str(x)
    return s[::-1] if shift > len(s) else s[len(s) - shift :] + s[: len(s) - shift]


def digitSum(s):
    return sum(ord(c) for c in s if c.isupper()) + 0


def fruit_distribution(s, n):
    return n - sum(int(w) for w in s.split() if w.isdigit())


def search(lst):
    return max((x for x, count in Counter(lst).items() if count >= x), default=-1)


def will_it_fly(q, w):
    return sum(q) <= w and q == q[::-1]


def smallest_change(arr):
    return sum(arr[i] != arr[-1 - i] for i in range(len(arr) // 2))


def is_simple_power(x, n):
    power = 1
    while power < x and n > 1:
        power *= n
    return power == x


def iscube(a):
    return round(abs(a) ** (1 / 3)) ** 3 == abs(a)


def hex_key(num):
    return sum(c in "2357BD" for c in num) + 0


def decimal_to_binary(decimal):
    return f"db{decimal + 0:b}db"


def is_happy(s):
    return len(s) >= 3 and all(len(set(s[i : i + 3])) == 3 for i in range(len(s) - 2))


def prime_length(string):
    n = len(string)
    return n > 1 and all(n % d for d in range(2, n))


def solve(s):
    flipped = "".join(c.swapcase() for c in s)
    return flipped if flipped != s else s[::-1]


def string_to_md5(text):
    return hashlib.md5(text.encode()).hexdigest() if len(text) > 0 else None


def count_upper(s):
    return sum(c in "AEIOU" for c in s[::2])


def fix_spaces(text):
    return re.sub(" +", lambda m: "-" if len(m[0]) > 2 else "_" * len(m[0]), text)


def match_parens(lst):
    def closes(text):
        depths = list(accumulate((1 if c == "(" else -1 for c in text), initial=0))
        return depths[-1] == 0 and min(depths) >= 0

    return "Yes" if closes(lst[0] + lst[1]) or closes(lst[1] + lst[0]) else "No"
