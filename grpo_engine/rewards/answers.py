r"""Reading an answer, and whether two answers are equal.

An answer is read from the outside in: several answers, a tuple, a set, a matrix, an inequality or an interval, a name with
its value, and in the end a number with its unit or an expression. Two answers are equal when they have the same parts:

    several answers, sets    in any order; "1 or 2" is 1,2, and \pm 2 is 2,-2
    tuples, matrices         in their order
    intervals, inequalities  with the same ends, each against the other
    numbers                  exactly; a decimal to 6 places and one part in 10,000 (`quantity`)
    expressions              where math-verify finds them equal and their values agree, relative to their size

What says more than an answer ("5 (or 6)", "not 5", "at least 5", "5 = 6") equals only the same text.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, TypeVar

from grpo_engine.rewards.notation import CURRENCY, ROW_BREAK, spelling, tidy
from grpo_engine.rewards.quantity import (
    SCALES,
    Based,
    Number,
    Unit,
    read_based,
    read_number,
    read_unit,
    same_number,
)

if TYPE_CHECKING:
    from sympy import Expr

# Without this every worker would warn once that math-verify's time limits are off (see `math`).
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER_CHARS = 1_000  # of an answer that is read; a longer one is right when it is the truth's own text
MAX_DEPTH = 20  # of answers within answers
MAX_NESTING = 20  # of brackets in an expression
MAX_PARTS = 200  # of one answer
EXACT, ROUNDED = 1e-9, 1e-4  # how far two expressions' values may differ, as a share of them

_PIECE = re.compile(r"\\[A-Za-z]+\*?|\\.|[A-Za-z]+|.", re.DOTALL)
_OPEN = frozenset({"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil", r"\begin"})
_SHUT = frozenset({")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil", r"\end"})
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}
_SEPARATORS = frozenset({",", ";", "or", "and", r"\lor", r"\vee", r"\land", r"\wedge"})
_JOINED = re.compile(r"\\text\{,? ?(or|and),?\}", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")
_DOTS = re.compile(r"\\[lc]?dots[cbmi]?(?![A-Za-z])|\.\.\.")
_RELATION = frozenset({"=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\in", r"\simeq"})
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?!frac|sqrt|text|pi|infty)[A-Za-z]+)'*(?: ?_ ?(?:[A-Za-z0-9]|\{[^{}]*\}))?")
_NAME = re.compile(  # what stands before "=" and is no part of the answer: x, f(x), |AB|, \angle ABC, (x, y), \text{Area}
    r"(?:[A-Za-z' |]|\\(?!frac|sqrt|times|cdot|text)[A-Za-z]+(?![A-Za-z])|\\text\{[^{}]*\}"
    r"|_(?:[A-Za-z0-9]|\{[^{}]*\})|\^\{-1\}|\([^()]*\))+"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_WORDS = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_ONLY_WORDS = re.compile(r"(?:\\text\{[^{}]*\}|[A-Za-z .'-])+")
# Words after which an answer is no longer the number that stands beside them.
_HEDGES = frozenset(
    "or not no nor neither either maybe perhaps possibly might could least most more less fewer greater smaller larger than "
    "above below over under between except without unless if up only".split()
)
_FILLERS = frozenset("about approximately approx roughly exactly answer the is are final total of equals a an".split())
_MINUS = frozenset(("minus", "negative"))
_LEADING_WORDS = re.compile(
    r"((?:(?:\\text\{[A-Za-z :]+\}|[A-Za-z]{2,}(?![A-Za-z])):? ?)+)(?=[-+\d\\(\[.|" + CURRENCY + "])"
)
_TRAILING_UNIT = re.compile(
    r"(?<=[\d})\]!A-Za-z"
    + CURRENCY
    + r"])( ?(?:\\text\{[^{}]*\}|\^\\circ ?[CF]?)(?: ?\^ ?(?:\{-?\d\}|\d))?(?: ?/ ?\\text\{[^{}]*\})?)+$"
)
_TRAILING_WORDS = re.compile(r"(?<=[\d})!%])( [A-Za-z]{2,}\.?(?:[ /][A-Za-z]+\.?)*|[a-z]{2,3})(?:\^(\d|\{-?\d\}))?$")
_NOUN = re.compile(r"(?=.*[aeiou])[A-Za-z]{4,}\.?")  # no product of variables
_NOTE = re.compile(r" ?\((?:\\text\{[A-Za-z ,.]*\}|[A-Za-z]{4,}[A-Za-z ,.]*)\)$")
_SPACED_DIGITS = re.compile(r"(?<![_^\d])\d+ \d")
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix|smallmatrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_VECTOR_MARK = re.compile(r"\^(?:T|\{(?:T|\\top)\}|\\top)$")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_INFINITY = re.compile(r"([-+]?) ?(?:\\infty|\\infin|infinity|oo|inf)")


@dataclass(frozen=True)
class Leaf:
    """A number with its unit, or an expression, or words."""

    text: str  # tidy, without the unit
    number: Number | None = None
    unit: Unit | None = None
    scale: int = 1  # of "million"


@dataclass(frozen=True)
class Opaque:
    """What equals only its own text."""

    text: str


@dataclass(frozen=True)
class Many:
    """Several answers: opened by "" in any order, by a brace in any order and each once, by another bracket in its order."""

    items: tuple[Answer, ...]
    opened: str = ""
    shut: str = ""


@dataclass(frozen=True)
class Grid:
    """A matrix."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Region:
    """Intervals of the line, and the variable that an inequality gave them."""

    spans: tuple[tuple[Answer, bool, Answer, bool], ...]  # lower end, whether it is left out, upper end, whether it is
    variable: str = ""


@dataclass(frozen=True)
class Named:
    """A name with its value."""

    name: str
    value: Answer
    text: str


@dataclass(frozen=True)
class Chain:
    """Constants that are said to be equal, or nearly so."""

    parts: tuple[Answer, ...]
    nearly: bool


T = TypeVar("T")
Answer = Leaf | Opaque | Many | Grid | Region | Named | Chain
_DOLLARS = read_unit("dollars")
_ENDLESS = {sign: Leaf(f"{sign}\\infty") for sign in ("", "-")}


def equal(gold: str, found: str) -> bool:
    """Whether two answers are equal.

    Args:
        gold: the true answer, LaTeX or plain text, without a box.
        found: the answer that is judged, likewise.
    """
    if len(gold) > MAX_ANSWER_CHARS or len(found) > MAX_ANSWER_CHARS:
        if max(len(gold), len(found)) > 4 * min(len(gold), len(found)) + MAX_ANSWER_CHARS:
            return False  # unread: spaces and markup do not make that much
        return bool(found.strip()) and (gold.strip() == found.strip() or spelling(gold) == spelling(found))
    return _equal(gold, found)


# One problem's answers come in groups and are often the same: a cache of verdicts saves most of the parsing.
@functools.lru_cache(maxsize=8192)
def _equal(gold: str, found: str) -> bool:
    plain_gold, plain_found = spelling(gold), spelling(found)
    if not plain_found:
        return False
    tidy_gold, tidy_found = tidy(gold), tidy(found)
    if plain_gold == plain_found:
        return True
    one, other = read_number(tidy_gold), read_number(tidy_found)
    if one is not None and other is not None and CURRENCY not in tidy_gold + tidy_found:
        return same_number(one, other)
    return _same(_read_cached(tidy_gold), _read_cached(tidy_found))


@functools.lru_cache(maxsize=8192)
def _read_cached(text: str) -> Answer:
    return read(text)


def says_more(answer: str) -> bool:
    """Whether a text is several answers, or more than an answer, so that no part of it may be taken for one.

    Args:
        answer: one line.
    """
    return isinstance(_read_cached(tidy(answer[:MAX_ANSWER_CHARS])), (Opaque, Many, Chain))


def is_words(answer: str) -> bool:
    """Whether an answer is words alone, which prove nothing in running text."""
    return bool(_WORD.fullmatch(spelling(answer)))


def found_in(gold: str, text: str) -> bool:
    """Whether math-verify finds an answer in running text, and it is the true one.

    Args:
        gold: `notation.tidy` of the true answer.
        text: a response, or its end.
    """
    truth = _read_cached(gold)
    if isinstance(truth, Leaf) and truth.scale == 1:
        gold = truth.text
        if truth.number is not None and not truth.number.percent and "e" in gold.lower():  # for math-verify 1.5 e 3
            gold = f"\\frac{{{truth.number.value.numerator}}}{{{truth.number.value.denominator}}}"
    return verified(parsed(f"\\boxed{{{_for_parser(gold)}}}"), parsed(text))


def common_form(answer: str) -> str:
    """What answers that say the same have in common, as far as that can be told from each alone.

    Args:
        answer: LaTeX or plain text, without a box.

    Returns:
        A number's value, or the `notation.spelling`.
    """
    number = read_number(tidy(answer)) if len(answer) <= MAX_ANSWER_CHARS else None
    return spelling(answer) if number is None else f"{number.value}{'%' if number.percent else ''}"


def read(text: str, depth: int = 0) -> Answer:
    """The parts of an answer.

    Args:
        text: `notation.tidy`, or a piece of it.
        depth: of answers that this one is in.

    Returns:
        An `Answer`. What is not understood is a `Leaf`, left to math-verify.
    """
    text = _unwrapped(text.strip())
    if depth > MAX_DEPTH or not text:
        return Opaque(text)
    number = read_number(text)
    if number is not None:
        return Leaf(text, number, _DOLLARS if CURRENCY in text else None)
    parts, separators = _split(_THOUSANDS.sub(_without_commas, _JOINED.sub(r" \1 ", text)), _SEPARATORS)
    parts = [part for part in parts if part]
    if len(parts) > 1 and any(s in separators for s in ("or", "and")) and _HEDGES & _words(text, ("or", "and")):
        return Opaque(text)
    if len(parts) > MAX_PARTS:
        return Opaque(text)
    if len(parts) > 1:
        return _several([read(part, depth + 1) for part in parts], separators)
    if separators and parts:  # a comma at the end
        text = parts[0]
    return _read_relation(text, depth) or _read_group(text, depth) or _read_leaf(text)


def _without_commas(match: re.Match) -> str:
    return match.group().replace(",", "")


def _unwrapped(text: str) -> str:
    """Without braces, dollars of a text that is all words, and a leading approximation sign."""
    for _ in range(MAX_DEPTH):
        if not (text.startswith("{") and text.endswith("}") and _closes(text, "{") == len(text) - 1):
            break
        text = text[1:-1].strip()
    if (match := _TEXT.fullmatch(text)) and (inner := match[1].strip()):
        return inner
    return text.removeprefix(r"\approx").strip()


def _closes(text: str, opened: str) -> int:
    """Where the bracket that a text begins with is closed; -1 for nowhere."""
    depth = 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        depth += (piece in _OPEN) - (piece in _SHUT)
        if depth == 0:
            return match.start() if piece != opened else -1
    return -1


def _split(text: str, marks: frozenset[str]) -> tuple[list[str], list[str]]:
    """The pieces of a text between marks that stand outside of all brackets, and those marks."""
    parts, found, start, depth = [], [], 0, 0
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece in _OPEN:
            depth += 1
        elif piece in _SHUT:
            depth -= 1
        elif depth <= 0 and piece in marks:
            parts.append(text[start : match.start()].strip())
            found.append(piece)
            start = match.end()
    return [*parts, text[start:].strip()], found


def _words(text: str, besides: Sequence[str] = ()) -> set[str]:
    return {w.lower() for w in _WORDS.findall(_TEXT.sub(r" \1 ", text))} - set(besides)


def _several(items: list[Answer], separators: list[str]) -> Answer:
    regions = [item for item in items if isinstance(item, Region)]
    if len(regions) == len(items) and len({r.variable for r in regions}) == 1 and regions[0].variable:
        if any(s in ("or", r"\lor", r"\vee") for s in separators):
            return Region(tuple(span for r in regions for span in r.spans), regions[0].variable)
        if len(regions) == 2 and all(len(r.spans) == 1 for r in regions):
            one, other = (r.spans[0] for r in regions)
            if _is_endless(one[2]) and _is_endless(other[0]):  # x > 1, x < 3
                return Region((one[:2] + other[2:],), regions[0].variable)
            if _is_endless(other[2]) and _is_endless(one[0]):
                return Region((other[:2] + one[2:],), regions[0].variable)
    flat: list[Answer] = []
    for item in items:  # "\pm 2, 3"
        flat.extend(item.items if isinstance(item, Many) and not item.opened else [item])
    names = [item.name for item in flat if isinstance(item, Named)]
    if names and len(set(names)) == 1:  # n = 2, 3, 4, or x = 1 or x = 2
        flat = [item.value if isinstance(item, Named) else item for item in flat]
    return Many(tuple(flat))


def _is_endless(answer: Answer) -> bool:
    return isinstance(answer, Leaf) and answer.text.endswith(r"\infty")


def _read_relation(text: str, depth: int) -> Answer | None:
    parts, marks = _split(text, _RELATION)
    if not marks:
        return None
    if not all(parts):
        return Leaf(text)
    if marks == [r"\in"]:
        return read(parts[1], depth + 1) if _VARIABLE.fullmatch(parts[0]) else Leaf(text)
    if set(marks) <= {"<", r"\le"} or set(marks) <= {">", r"\ge"}:
        return _read_inequality(text, parts, marks, depth)
    if r"\ne" in marks:
        return Leaf(text) if _has_symbols(text) else Opaque(text)
    if not set(marks) <= {"=", r"\approx", r"\simeq"}:
        return Leaf(text)
    nearly = marks.count("=") < len(marks)
    if not _has_symbols(parts[0]):
        if all(not _has_symbols(part) for part in parts):
            return Chain(tuple(read(part, depth + 1) for part in parts), nearly)
        if len(parts) == 2 and _VARIABLE.fullmatch(parts[1]):  # 5 = x
            return Named(parts[1], read(parts[0], depth + 1), text)
        return Leaf(text)
    if not _NAME.fullmatch(parts[0]):
        return Leaf(text)
    constants = [part for part in parts[1:] if not _has_symbols(part)]
    if len(constants) > 1:
        return Named(parts[0], Chain(tuple(read(part, depth + 1) for part in constants), nearly), text)
    return Named(parts[0], read(parts[-1], depth + 1), text)


def _has_symbols(text: str) -> bool:
    """Whether a variable stands in a text; words, units, e, i and pi are none."""
    bare = re.sub(r"\\text\{[^{}]*\}|\\[A-Za-z]+|(?<=\d)[eE](?=[-+]?\d)|[A-Za-z]{3,}", " ", text)
    greek = re.search(
        r"\\(?:alpha|beta|gamma|delta|varepsilon|epsilon|theta|lambda|mu|rho|sigma|phi|psi|omega|ell)(?![A-Za-z])", text
    )
    return bool(greek or re.search(r"[A-Za-df-hj-z]", bare)) or bool(re.fullmatch(r"[A-Za-z ]*", text))


def _read_inequality(text: str, parts: list[str], marks: list[str], depth: int) -> Answer:
    if marks[0] in (">", r"\ge"):
        parts, marks = parts[::-1], ["<" if m == ">" else r"\le" for m in reversed(marks)]
    symbols = [_has_symbols(part) for part in parts]
    if not any(symbols):
        return Opaque(text)
    place = symbols.index(True)
    if sum(symbols) > 1 or not _VARIABLE.fullmatch(parts[place]) or len(parts) > 3 or (len(parts) == 3 and place != 1):
        return Leaf(text)
    low, low_open = (read(parts[place - 1], depth + 1), marks[place - 1] == "<") if place else (_ENDLESS["-"], True)
    high, high_open = (
        (read(parts[place + 1], depth + 1), marks[place] == "<") if place + 1 < len(parts) else (_ENDLESS[""], True)
    )
    return Region(((low, low_open, high, high_open),), parts[place])


def _read_group(text: str, depth: int) -> Answer | None:
    parts, unions = _split(text, frozenset({r"\cup"}))
    if unions:
        pieces = [read(part, depth + 1) for part in parts]
        spans = [s for s in map(_spans, pieces) if s is not None]
        if len(spans) == len(pieces):
            return Region(tuple(span for s in spans for span in s))
        return Leaf(text)
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in match[2].split(ROW_BREAK) if row.strip()]
        if len(rows) * match[2].count("&") > MAX_PARTS**2:
            return Opaque(text)
        return Grid(tuple(tuple(read(cell, depth + 1) for cell in row.split("&")) for row in rows))
    text = _VECTOR_MARK.sub("", text)
    for opened in _BRACKETS:
        if not text.startswith(opened):
            continue
        end = _closes(text, opened)
        shut = next((s for s in ("\\}", "\\rangle", ")", "]") if text[end:] == s), None) if end > 0 else None
        if shut is None:
            return None
        inner = text[len(opened) : end].strip()
        items, marks = _split(inner, frozenset({",", ";"}))
        if len(items) > MAX_PARTS:
            return Opaque(text)
        if opened == r"\{":
            if not inner or re.search(r"\\mid(?![A-Za-z])|[|:]", inner):
                return Leaf(text)
            read_items = _several([read(item, depth + 1) for item in items], marks)
            return Many(read_items.items if isinstance(read_items, Many) else (read_items,), opened, shut)
        if len(items) > 1 and all(items):
            return Many(tuple(read(item, depth + 1) for item in items), opened, shut)
        return read(inner, depth + 1) if opened == "(" and shut == ")" else None
    return None


def _spans(answer: Answer) -> tuple[tuple[Answer, bool, Answer, bool], ...] | None:
    """The intervals that an answer may stand for."""
    if isinstance(answer, Region):
        return answer.spans
    if isinstance(answer, Many) and len(answer.items) == 2 and answer.opened in ("(", "[") and answer.shut in (")", "]"):
        low, high = answer.items
        return ((low, answer.opened == "(", high, answer.shut == ")"),)
    return None


def _read_leaf(text: str) -> Answer:
    if len(_PLUS_MINUS.findall(text)) == 1:
        return Many(tuple(read(_PLUS_MINUS.sub(sign, text).removeprefix("+"), MAX_DEPTH) for sign in "+-"))
    if match := _INFINITY.fullmatch(text):
        return _ENDLESS["-" if match[1] == "-" else ""]
    if _ONLY_WORDS.fullmatch(text):
        return Leaf(text)
    words = _words(text)
    if words & _HEDGES or "?" in text:
        return Opaque(text)
    text = _NOTE.sub("", text) if text[-1] == ")" else text
    if match := _LEADING_WORDS.match(text):
        leading = _words(match[1])
        if leading <= _FILLERS:
            text = text[match.end() :]
        elif leading <= _MINUS | _FILLERS:
            text = f"-{text[match.end() :]}"
    text, unit_words = _without_unit(text)
    scale, unit = 1, None
    if unit_words:
        names = unit_words.lower().split()
        while names and names[0].removesuffix("s") in SCALES:
            scale *= SCALES[names.pop(0).removesuffix("s")]
        if any(name.removesuffix("s") in SCALES for name in names):
            return Opaque(text)
        if any(c.isdigit() for c in re.sub(r"\^\{?-?\d\}?", "", unit_words)):
            return Opaque(text)
        unit = read_unit(" ".join(unit_words.split()[-len(names) :])) if names else None
    elif CURRENCY in text:
        unit = _DOLLARS
    text = _unwrapped(text.replace(CURRENCY, "").strip())
    number = read_number(text)
    if number is None and _SPACED_DIGITS.search(text):
        return Opaque(text)
    return Leaf(text, number, unit, scale)


def _without_unit(text: str) -> tuple[str, str]:
    """A number or expression, and the words behind it."""
    if match := _TRAILING_UNIT.search(text):
        words = _TEXT.sub(r" \1", match.group()).replace(r"^\circ", " degree ")
        words = re.sub(r"(degree) +[CF]$", r"\1", words)
        if re.fullmatch(r" *per ?cent(?:age)? *", words):
            return text[: match.start()].rstrip() + "%", ""
        return text[: match.start()].rstrip(), " ".join(words.split())
    if match := _TRAILING_WORDS.search(text):
        words = match.group().strip()
        if words.lower() in ("percent", "percentage"):
            return text[: match.start()] + "%", ""
        noun = words.split()[0]
        if read_unit(words) or (match[1].startswith(" ") and (noun.removesuffix("s") in SCALES or _NOUN.fullmatch(noun))):
            return text[: match.start()].rstrip(), words
    return text, ""


def _same(gold: Answer, found: Answer) -> bool:
    """Whether two answers have the same parts."""
    if isinstance(found, Opaque) or isinstance(gold, Opaque):
        return spelling(_text(gold)) == spelling(_text(found))
    if isinstance(found, Chain):
        return _same_as_chain(gold, found)
    if isinstance(gold, Chain):
        return _same(gold.parts[-1], found) or (gold.nearly and _same(gold.parts[0], found))
    if isinstance(gold, Named) and isinstance(found, Named):
        if _same(gold.value, found.value):
            return True
        return not isinstance(found.value, Chain) and _verified(gold.text, found.text)
    if isinstance(found, Named):
        if isinstance(gold, Leaf) and "=" in gold.text:  # an equation that is the answer
            return _verified(gold.text, found.text)
        return _same(gold, found.value)
    if isinstance(gold, Named):
        if isinstance(found, Leaf) and "=" in found.text and _has_symbols(gold.text):
            return _verified(gold.text, found.text)
        return _same(gold.value, found)
    if isinstance(gold, Region) or isinstance(found, Region):
        return _same_region(gold, found)
    if isinstance(gold, Many) and isinstance(found, Many):
        return _same_many(gold, found)
    if isinstance(gold, Grid) or isinstance(found, Grid):
        return _same_grid(gold, found)
    if isinstance(gold, Many) or isinstance(found, Many):
        several = gold if isinstance(gold, Many) else found
        assert isinstance(several, Many)  # one of the two is
        if len(several.items) == 1:
            one = several.items[0]
            return _same(one, found) if several is gold else _same(gold, one)
        if not several.opened:
            return False  # several answers answer no one question
        return _verified(_text(gold), _text(found))
    return _same_leaf(gold, found)


def _text(answer: Answer) -> str:
    """An answer in LaTeX again."""
    match answer:
        case Leaf(text=text) | Opaque(text=text) | Named(text=text):
            return text
        case Many(items=items, opened=opened, shut=shut):
            return f"{opened}{', '.join(map(_text, items))}{shut}"
        case Grid(rows=rows):
            cells = r" \\ ".join(" & ".join(map(_text, row)) for row in rows)
            return rf"\begin{{pmatrix}}{cells}\end{{pmatrix}}"
        case Chain(parts=parts):
            return " = ".join(map(_text, parts))
        case Region(spans=spans):
            return r" \cup ".join(
                f"{'(' if low_open else '['}{_text(low)}, {_text(high)}{')' if high_open else ']'}"
                for low, low_open, high, high_open in spans
            )
    raise TypeError(f"_text: no answer: {answer!r}")


def _same_as_chain(gold: Answer, found: Chain) -> bool:
    """A chain says one thing when all of its parts are equal, or the later ones round the first."""
    *before, last = found.parts
    if not found.nearly:
        return _same(gold, last) and all(_same(last, part) for part in before)
    if not (_same(gold, found.parts[0]) or _same(gold, last)):
        return False
    first, *others = (_value(part) for part in found.parts)
    return first is not None and all(v is not None and abs(v - first) <= 1e-2 * abs(first) for v in others)


def _same_region(gold: Answer, found: Answer) -> bool:
    ours, theirs = _spans(gold), _spans(found)
    if ours is None or theirs is None:
        return not isinstance(found, Many) and not isinstance(gold, Many) and _verified(_text(gold), _text(found))
    if isinstance(gold, Region) and isinstance(found, Region) and gold.variable and found.variable:
        if gold.variable != found.variable:
            return False
    if len(ours) == len(theirs):
        return _matched(ours, theirs, lambda a, b: a[1] == b[1] and a[3] == b[3] and _same(a[0], b[0]) and _same(a[2], b[2]))
    return _verified(_text(Region(ours)), _text(Region(theirs)))


def _same_many(gold: Many, found: Many) -> bool:
    if any(_DOTS.search(_text(item)) for item in (*gold.items, *found.items)):
        return _in_order(gold.items, found.items)  # "1, 2, ..., n": what the dots stand for is nobody's to say
    gold_items, found_items = gold.items, found.items
    if gold.opened == r"\{" or found.opened == r"\{":
        gold_items, found_items = _distinct(gold_items), _distinct(found_items)
    if len(gold_items) != len(found_items):
        return False
    ours = [item for item in gold_items if isinstance(item, Named)]
    theirs = [item for item in found_items if isinstance(item, Named)]
    if len(ours) == len(theirs) == len(gold_items):  # x = 1, y = 2
        names, values = {item.name for item in ours}, {item.name: item for item in theirs}
        if len(names) == len(ours) and names == values.keys():
            return all(_same(item, values[item.name]) for item in ours)
    elif len(ours) == len(gold_items) or len(theirs) == len(found_items):
        return _in_order(gold_items, found_items)
    ordered = [many.opened not in ("", r"\{") for many in (gold, found)]
    if all(ordered) and len(gold_items) == 2 and (gold.opened, gold.shut) != (found.opened, found.shut):
        if {gold.opened, found.opened} <= {"(", "["}:
            return False  # other intervals
    if any(ordered):
        return _in_order(gold_items, found_items)
    return _matched(gold_items, found_items, _same)


def _in_order(gold: Sequence[Answer], found: Sequence[Answer]) -> bool:
    return len(gold) == len(found) and all(_same(a, b) for a, b in zip(gold, found, strict=True))


def _distinct(items: tuple[Answer, ...]) -> tuple[Answer, ...]:
    kept: list[Answer] = []
    for item in items:
        if not any(_same(k, item) for k in kept):
            kept.append(item)
    return tuple(kept)


def _matched(gold: Sequence[T], found: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Whether each has a partner among the others."""
    left = list(found)
    for one in gold:
        place = next((i for i, other in enumerate(left) if one == other), None)
        if place is None:
            place = next((i for i, other in enumerate(left) if same(one, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _same_grid(gold: Answer, found: Answer) -> bool:
    if isinstance(gold, Grid) and isinstance(found, Grid):
        return len(gold.rows) == len(found.rows) and all(map(_in_order, gold.rows, found.rows))
    grid, other = (gold, found) if isinstance(gold, Grid) else (found, gold)
    assert isinstance(grid, Grid)  # one of the two is
    if isinstance(other, Many) and other.opened in ("(", r"\langle") and other.shut in (")", r"\rangle"):
        columns = [row[0] for row in grid.rows] if all(len(row) == 1 for row in grid.rows) else None
        vector = columns or (grid.rows[0] if len(grid.rows) == 1 else None)
        return vector is not None and _in_order(vector, other.items)
    return isinstance(other, Leaf) and _verified(_text(gold), _text(found))


def _same_leaf(gold: Leaf, found: Leaf) -> bool:
    factor = Fraction(found.scale, gold.scale)
    if gold.unit is not None and found.unit is not None:
        if gold.unit.dimension != found.unit.dimension:
            return False
        factor *= found.unit.size / gold.unit.size
    if gold.number is not None and found.number is not None:
        return same_number(gold.number, found.number._replace(value=found.number.value * factor))
    based, their_based = read_based(gold.text), read_based(found.text)
    if based or their_based:
        return _same_based(based, their_based, gold, found)
    if bool(_DOTS.search(gold.text)) != bool(_DOTS.search(found.text)):
        return False
    if spelling(gold.text) == spelling(found.text):
        return factor == 1
    plain_gold, plain_found = spelling(gold.text), spelling(found.text)
    if _WORD.fullmatch(plain_gold):
        return plain_gold.lower() == plain_found.lower()
    if _DOTS.search(gold.text):
        return False
    if ":" in gold.text and ":" in found.text:
        return _same_ratio(gold.text, found.text)
    if factor != 1:
        return _verified(gold.text, rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({found.text})")
    return _verified(gold.text, found.text)


def _same_based(gold: Based | None, found: Based | None, gold_leaf: Leaf, found_leaf: Leaf) -> bool:
    if gold and found:
        return gold == found
    if gold:  # the base was left out
        return found_leaf.text.lstrip("0") == gold.digits
    assert found  # one of the two is there
    return gold_leaf.number is not None and gold_leaf.number.value == int(found.digits, found.base)


def _same_ratio(gold: str, found: str) -> bool:
    """1:2 is 2:4, but 10:50 is a time."""
    ours, theirs = (part.split(":") for part in (gold, found))
    if len(ours) != len(theirs):
        return False
    ours, theirs = [p.strip() for p in ours], [p.strip() for p in theirs]
    if any(len(p) == 2 and p.isdigit() for p in (*ours[1:], *theirs[1:])):
        return [spelling(p).lstrip("0") for p in ours] == [spelling(p).lstrip("0") for p in theirs]
    return all(
        _verified(rf"\frac{{{a}}}{{{ours[-1]}}}", rf"\frac{{{b}}}{{{theirs[-1]}}}")
        for a, b in zip(ours[:-1], theirs[:-1], strict=True)
    )


def _value(answer: Answer) -> float | None:
    if isinstance(answer, Leaf) and answer.number is not None:
        return float(answer.number.value) * answer.scale
    if not isinstance(answer, Leaf):
        return None
    for expression in parsed(f"\\boxed{{{_for_parser(answer.text)}}}"):
        try:
            return float(expression.evalf(15))
        except Exception:  # sympy's, of any kind
            return None
    return None


def _nesting(text: str) -> int:
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _for_parser(text: str) -> str:
    return text.replace(ROW_BREAK, r"\\").replace(CURRENCY, "")


def _verified(gold: str, found: str) -> bool:
    if _nesting(gold) > MAX_NESTING or _nesting(found) > MAX_NESTING:
        return False  # math-verify's parser takes minutes
    return verified(*(parsed(f"\\boxed{{{_for_parser(text)}}}") for text in (gold, found)))


@functools.lru_cache(maxsize=8192)
def parsed(text: str) -> tuple:
    """What math-verify finds in a text.

    Args:
        text: with the answer in a box, in dollars, or in prose.

    Returns:
        Its expressions, of sympy; empty for none.
    """
    from math_verify import parse

    # No fallback to text: text equality is decided above, by our own spelling.
    return tuple(parse(text, fallback_mode="no_fallback", parsing_timeout=None))


def verified(gold: tuple, found: tuple) -> bool:
    """Whether math-verify finds two answers equal, and their values agree.

    math-verify takes numbers for equal that agree to 6 or 15 decimals, however small they are.

    Args:
        gold: what `parsed` gave for the truth.
        found: for the answer.
    """
    from math_verify import verify

    if not (gold and found) or not verify(list(gold), list(found), timeout_seconds=None, allow_set_relation_comp=True):
        return False
    return not _differ(gold[0], found[0])


def _differ(gold: object, found: object) -> bool:
    """Whether two expressions have values that are far apart, relative to their size."""
    from sympy import Expr, Float, Rational

    if not (isinstance(gold, Expr) and isinstance(found, Expr)) or gold.free_symbols != found.free_symbols:
        return False
    tolerance = ROUNDED if gold.has(Float) or found.has(Float) else EXACT
    symbols = sorted(gold.free_symbols, key=str)
    for shift in (0, 1) if symbols else (0,):
        at = {s: Rational(7 + 3 * i + shift, 5) for i, s in enumerate(symbols)}
        a, b = _evaluated(gold, at), _evaluated(found, at)
        if a is None or b is None:
            continue
        size = max(abs(a), abs(b))
        if (
            size
            and abs(a - b) > tolerance * size
            and abs(a * 100 - b) > tolerance * size
            and abs(a - b * 100) > tolerance * size
        ):
            return True
    return False


def _evaluated(expression: Expr, at: dict) -> Expr | None:
    from sympy import Number as SympyNumber

    try:
        value = expression.subs(at).doit()
        value = value if isinstance(value, SympyNumber) else value.evalf(30)
        # of a sum that cancels, what evalf cannot tell from 0 has a precision of 1
        if not value.is_number or not value.is_finite or getattr(value, "_prec", 100) == 1:
            return None
        return value
    except Exception:  # sympy's, of any kind
        return None
