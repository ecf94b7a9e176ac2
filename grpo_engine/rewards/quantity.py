r"""Numbers as people write them, and the units behind them.

A number is exact: "0.1" is 1/10, "1 1/4" and "1\frac{1}{4}" are 5/4, "1.5e3" and "1.5 \times 10^3" are 1500, "1,234" and
"1 234" are 1234. A unit has a dimension and a size, so that 5 m are 500 cm and not 5 cm; a noun ("apples") has neither.
"""

from __future__ import annotations

import decimal
import re
from fractions import Fraction
from typing import NamedTuple

from grpo_engine.rewards.notation import CURRENCY

MAX_DIGITS = 4_000  # of a numeral; Python refuses to read more than 4,300 at once
MAX_POWER = 4_000  # of ten
DECIMALS = 6  # to which a decimal number must agree with what it stands for
RELATIVE = Fraction(1, 10_000)  # and as a share of it: what is small must not be lost in the decimals

_PLAIN = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.\d*|\.?\d+"
_POWER = r"10\^(?:\{([-+]?\d+)\}|([-+]?\d+))"
_MIXED = re.compile(r"(\d+)(?: (\d+) ?/ ?(\d+)| ?\\frac\{(\d+)\}\{(\d+)\})")
_RATIO = re.compile(r"\\frac\{ ?([-+]?\d+) ?\}\{ ?([-+]?\d+) ?\}|(\d+) ?/ ?(\d+)")
_SCIENTIFIC = re.compile(rf"({_PLAIN})(?:[eE]([-+]?\d+)| ?(?:\\times|\\cdot|\*|x|X) ?{_POWER})?|{_POWER}")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\{(\d+)\}")
_PER_CENT = re.compile(r" ?(?:\\?%|\\text\{per ?cent(?:age)?\}|per ?cent)$")
_BASED = re.compile(r"\(?([0-9A-Z]+)\)? ?_(?:\{ ?(?:\\text\{)?(\d+|[a-z]+)\}? ?\}|(?:\\text\{)?(\d|[a-z]+)\}?)")
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "sixteen": 16,
}  # fmt: skip


class Number(NamedTuple):
    """A numeral."""

    value: Fraction
    decimal: bool  # written with a point: it may stand for a number with more digits
    percent: bool = False


def number_text(value: int | float | decimal.Decimal) -> str:
    """What a number of a data file says, in digits: 1e-05 is "0.00001", 1e16 is "10000000000000000".

    Args:
        value: finite.

    Returns:
        The shortest decimal that is the number; no exponent, and "3.0" for the float 3.0.
    """
    if isinstance(value, float):
        value = decimal.Decimal(repr(float(value)))
    return format(value, "f") if isinstance(value, decimal.Decimal) else str(value)


def read_number(text: str) -> Number | None:
    """The number that a text is, all of it.

    Args:
        text: `notation.tidy`.

    Returns:
        None for anything else, and for a numeral beyond `MAX_DIGITS` or `MAX_POWER`.
    """
    if not text or len(text) > MAX_DIGITS:
        return None
    if text[0] == CURRENCY or text[-1] == CURRENCY:
        text = text.strip(CURRENCY + " ")
    sign = 1
    if text[:1] in "+-":
        sign, text = (-1 if text[:1] == "-" else 1), text[1:].lstrip(" " + CURRENCY)
    percent = text[-1:] in "%t}" and _PER_CENT.search(text)
    if percent:
        text = text[: percent.start()]
    found = _scientific(text) or _ratio(text) or _mixed(text) or _repeating(text)
    return found and Number(sign * found.value, found.decimal, bool(percent))


def _scientific(text: str) -> Number | None:
    match = _SCIENTIFIC.fullmatch(text)
    if match is None:
        return None
    mantissa, *powers = match.groups()
    mantissa = (mantissa or "1").replace(",", "")
    whole, point, rest = mantissa.partition(".")
    value = Fraction(int((whole + rest) or "0"), 10 ** len(rest)) if point else Fraction(int(mantissa))
    power = next((p for p in powers if p is not None), None)
    if power is not None:
        if len(power) > 6 or abs(int(power)) > MAX_POWER:
            return None
        value *= Fraction(10) ** int(power)
    return Number(value, decimal=bool(rest.strip("0")) and value.denominator != 1)


def _ratio(text: str) -> Number | None:
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    above, below = (int(group) for group in match.groups() if group is not None)
    return Number(Fraction(above, below), decimal=False) if below else None


def _mixed(text: str) -> Number | None:
    match = _MIXED.fullmatch(text)
    if match is None:
        return None
    whole, above, below = (int(group) for group in match.groups() if group is not None)
    return Number(whole + Fraction(above, below), decimal=False) if above < below else None


def _repeating(text: str) -> Number | None:
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    whole, fixed, period = match.groups()
    value = Fraction(int((whole + fixed) or "0")) + Fraction(int(period), 10 ** len(period) - 1)
    return Number(value / 10 ** len(fixed), decimal=False)


def same_number(one: Number, other: Number) -> bool:
    """Whether two numerals stand for one number.

    Exact ones must be equal. A decimal may be rounded: it must agree to 6 decimals, and to one part in 10,000. "20%" is
    answered by 20 and by 0.2.
    """
    if _close(one.value, other.value, one.decimal or other.decimal):
        return True
    if one.percent == other.percent:
        return False
    a, b = (n.value / 100 if n.percent else n.value for n in (one, other))
    return _close(a, b, one.decimal or other.decimal)


def _close(a: Fraction, b: Fraction, rounded: bool) -> bool:
    if a == b or not rounded:
        return a == b
    return round(a, DECIMALS) == round(b, DECIMALS) and abs(a - b) <= RELATIVE * max(abs(a), abs(b))


class Based(NamedTuple):
    """Digits and the base that they are written in."""

    digits: str
    base: int


def read_based(text: str) -> Based | None:
    r"""A numeral with its base, such as 101_2, (1A)_{16} or 21_{\text{three}}.

    Args:
        text: `notation.tidy`.

    Returns:
        None for anything else: x_2 is a variable, and 5_3 no numeral.
    """
    match = _BASED.fullmatch(text) if "_" in text and len(text) <= MAX_DIGITS else None
    if match is None or not any(c.isdigit() for c in match[1]):
        return None
    name = match[2] or match[3]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    if not (2 <= base <= 36 and all(int(c, 36) < base for c in match[1])):
        return None
    return Based(match[1].lstrip("0") or "0", base)


class Unit(NamedTuple):
    """What a number counts."""

    dimension: tuple[tuple[str, int], ...]  # such as (("length", 1), ("time", -1)), sorted
    size: Fraction  # in the dimension's first unit


_LENGTH, _TIME, _MASS, _MONEY, _VOLUME = "length", "time", "mass", "money", "volume"
_NAMES: dict[str, tuple[str, str]] = {  # names, one spelling each but for the plural: dimension, size
    "m meter metre": (_LENGTH, "1"), "km kilometer kilometre": (_LENGTH, "1000"),
    "cm centimeter centimetre": (_LENGTH, "1/100"), "mm millimeter millimetre": (_LENGTH, "1/1000"),
    "in inch inche": (_LENGTH, "127/5000"), "ft foot feet": (_LENGTH, "381/1250"),
    "yd yard": (_LENGTH, "1143/1250"), "mi mile": (_LENGTH, "201168/125"), "s sec second": (_TIME, "1"),
    "min minute": (_TIME, "60"), "h hr hour": (_TIME, "3600"), "day": (_TIME, "86400"), "week": (_TIME, "604800"),
    "month": ("month", "1"), "yr year": ("month", "12"), "g gram": (_MASS, "1"), "kg kilogram": (_MASS, "1000"),
    "mg milligram": (_MASS, "1/1000"), "lb pound": ("weight", "16"), "oz ounce": ("weight", "1"),
    "dollar usd": (_MONEY, "1"), "cent penny pennie": (_MONEY, "1/100"), "liter litre": (_VOLUME, "1"),
    "ml milliliter millilitre": (_VOLUME, "1/1000"), "mph": ("speed", "1"),
    "degree deg": ("angle", "1"), "radian rad": ("radian", "1"),
}  # fmt: skip
_UNITS = {name: (dimension, Fraction(size)) for names, (dimension, size) in _NAMES.items() for name in names.split()}
_POWERS = {"square": 2, "sq": 2, "cubic": 3}
_UNIT_TOKEN = re.compile(r"([A-Za-z]+)\.?(?:\^\{?(-?[1-9])\}?)?|(/)")


def read_unit(words: str) -> Unit | None:
    """The unit that words name.

    Args:
        words: such as "cm^2", "square feet", "miles per hour" or "feet/s".

    Returns:
        None for a noun that is no unit, or for several words of which one is none.
    """
    dimension: dict[str, int] = {}
    size, sign, power = Fraction(1), 1, 1
    for match in _UNIT_TOKEN.finditer(words):
        name = (match[1] or "").lower()
        if match[3] or name == "per":
            sign = -1
        elif name in _POWERS:
            power = _POWERS[name]
        else:
            found = _UNITS.get(match[1]) or _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
            if found is None:
                return None
            exponent = sign * power * int(match[2] or 1)
            dimension[found[0]] = dimension.get(found[0], 0) + exponent
            size *= found[1] ** exponent
            power = 1
    return Unit(tuple(sorted((name, n) for name, n in dimension.items() if n)), size) if dimension else None


SCALES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
