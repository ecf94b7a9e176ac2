r"""One notation of the many in which people and models write mathematics.

`tidy` keeps what an answer means and drops how it looks: Unicode becomes LaTeX ("½" is \frac{1}{2}), sizes and dollars go,
spacing commands are spaces, and words stay words (\text{...}). `spelling` goes further, to what two texts are compared by.
"""

from __future__ import annotations

import functools
import re
import unicodedata

REMEMBERED_CHARS = 1_000  # of an answer whose notation is kept for the next time

CURRENCY = "\N{CURRENCY SIGN}"  # stands for \$ and every currency's sign
ROW_BREAK = "\x01"  # stands for \\, which otherwise looks like the beginning of "\ " or "\,"

_SYMBOLS = {
    "°": r"^\circ ", "º": r"^\circ ", "∞": r"\infty ", "×": r"\times ", "✕": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "•": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-",
    "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "⩽": r"\le ", "≦": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≧": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∈": r"\in ", "∉": r"\notin ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "⌀": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∠": r"\angle ", "△": r"\triangle ", "⟨": r"\langle ", "⟩": r"\rangle ",
    "〈": r"\langle ", "〉": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "…": r"\ldots ", "⋯": r"\cdots ", "∨": r"\lor ", "→": r"\to ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
    "、": ",", "∣": "|", "∶": ":", "€": CURRENCY, "£": CURRENCY, "¥": CURRENCY, "₹": CURRENCY, "₽": CURRENCY, "₩": CURRENCY,
}  # fmt: skip
_LETTERS = "alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega".split()
for _name in _LETTERS:
    _SYMBOLS[unicodedata.lookup(f"GREEK SMALL LETTER {_name.replace('lambda', 'lamda').upper()}")] = f"\\{_name} "
for _name in "gamma delta theta lambda xi pi sigma phi psi omega".split():
    _SYMBOLS[unicodedata.lookup(f"GREEK CAPITAL LETTER {_name.replace('lambda', 'lamda').upper()}")] = f"\\{_name.title()} "

_UPPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ", "0123456789+-=()ni", strict=True))
_LOWER = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙᵢₖₘ", "0123456789+-=()nikm", strict=True))
_UPPER_RUN, _LOWER_RUN = re.compile(f"[{''.join(_UPPER)}]+"), re.compile(f"[{''.join(_LOWER)}]+")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT = re.compile(r"([√∛∜])\s*(?:(\d+(?:\.\d+)?|\\?[A-Za-z]+)|(?=[({]))")

_MARKS = re.compile(r"\\[()\[\]]|\$|\*\*")
_SIZES = re.compile(
    r"\\(?:left|right|middle|[Bb]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|mathopen|mathclose|boldsymbol)(?![A-Za-z])"
)
_FRACTIONS = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_BARE_FRACTION = re.compile(r"\\frac\s*(?:(\d)|(\{[^{}]*\}))\s*(?:(\d)|(\{[^{}]*\}))")
_CLOSE = re.compile(r"\\(?:!|negthinspace(?![A-Za-z]))")
_SPACINGS = re.compile(r"\\[,;:> \n]|~|\\(?:q?quad|thinspace|enspace|medspace)(?![A-Za-z])|\\[hm]space\*?\{[^{}]*\}")
_BRACED_COMMA = re.compile(r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d)")
_DEGREES = re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![A-Za-z])\s*\}?|\\degree(?![A-Za-z])")
_MARKED_WORDS = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|mathrm|mathbf|mathit|mathsf|mbox|hbox)\s*\{([^{}]*)\}")
_RELATIONS = re.compile(r"\\(?:(leq?(?:slant|q)?)|(geq?(?:slant|q)?)|(neq?)|(lt)|(gt))(?![A-Za-z])|\\not\s*=")
_RELATION_NAMES = (r"\le ", r"\ge ", r"\ne ", "<", ">")
_SQRT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(?:\(([^()]*)\)|(\d+))")
_SPACED_THOUSANDS = re.compile(r"(?<![\d._^])(?<!\d )(\d{1,3}(?: \d{3})+)(?! ?\d)")
_LONE = re.compile(r"([\^_])\s*\{\s*([A-Za-z0-9])\s*\}(?!\s*\d)")
_LABEL = re.compile(r"[A-Za-z]=(?=[^=])")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_UNIT_LETTERS, _DIGITS = frozenset("mshg"), frozenset("0123456789}")
_INNER_SPACE = re.compile(r"(?<!\d) | (?!\d)")


def tidy(latex: str) -> str:
    r"""The same answer with one way to write each thing.

    Args:
        latex: an answer, LaTeX or plain text.

    Returns:
        LaTeX in ASCII where ASCII has a notation: no dollars or sizes, single spaces, \frac, \le and \ge alone, \text{...}
        for words and no macro around a single letter, "^\circ" for degrees, `CURRENCY` for \$, `ROW_BREAK` for \\. A space
        between digits stays unless it marks thousands: "1 1/4" is not 11/4.
    """
    return _tidy(latex) if len(latex) <= REMEMBERED_CHARS else _tidy.__wrapped__(latex)


def spelling(latex: str) -> str:
    r"""What is compared to see whether two answers are the same text.

    Args:
        latex: an answer.

    Returns:
        Its `tidy` form without words' markup, degrees, currencies, a first "x=" and spaces that part no digits; "" for
        nothing but those.
    """
    return _spelling(latex) if len(latex) <= REMEMBERED_CHARS else _spelling.__wrapped__(latex)


@functools.lru_cache(maxsize=8192)
def _tidy(latex: str) -> str:
    text = in_ascii(latex)
    if "\\" in text or "$" in text or "*" in text or "~" in text:
        text = text.replace("\\\\", ROW_BREAK).replace("\\$", CURRENCY)
        text = _SIZES.sub("", _MARKS.sub(" ", text))
        text = _CLOSE.sub("", _BRACED_COMMA.sub("", text))
        text = _SPACINGS.sub(" ", text)
        text = _DEGREES.sub(r"^\\circ ", text)
        text = _MARKED_WORDS.sub(_words, text)
        text = _RELATIONS.sub(lambda m: _RELATION_NAMES[(m.lastindex or 3) - 1], text)
        text = _SQRT.sub(lambda m: f"\\sqrt{m[1] or ''}{{{m[3] if m[2] is None else m[2]}}}", text)
        text = _BARE_FRACTION.sub(_braced_fraction, _FRACTIONS.sub(r"\\frac", text))
    elif "{" in text:
        text = _BRACED_COMMA.sub("", text)
    text = " ".join(text.split()).rstrip(".").rstrip()
    if " " in text:
        text = _SPACED_THOUSANDS.sub(lambda m: m[1].replace(" ", ""), text)
    if "{" in text:
        text = _LONE.sub(r"\1\2", text.replace("{ ", "{").replace(" }", "}"))
    return text


def _words(match: re.Match) -> str:
    content = match[1].strip()
    if len(content) == 1:  # a variable, or what a number counts: 5\text{ m}
        counted = content in _UNIT_LETTERS and match.string[: match.start()].rstrip()[-1:] in _DIGITS
        return f"\\text{{{content}}}" if counted else f" {content} "
    if any(c.isdigit() for c in content):
        return f" {content} "  # \text{5 cm} is 5 cm
    return f"\\text{{{content}}}"


def _braced_fraction(match: re.Match) -> str:
    above, below = match[1] or match[2][1:-1], match[3] or match[4][1:-1]
    return f"\\frac{{{above}}}{{{below}}}"


@functools.lru_cache(maxsize=8192)
def _spelling(latex: str) -> str:
    text = tidy(latex)
    if "\\" in text:
        text = _TEXT.sub(r"\1", text).replace(r"^\circ", "")
    text = _INNER_SPACE.sub("", text.replace(CURRENCY, ""))
    return text[2:] if _LABEL.match(text) else text


def in_ascii(text: str) -> str:
    """A text, LaTeX or prose, with Unicode's mathematics in LaTeX and other spaces, dashes and digits in ASCII.

    Args:
        text: any.

    Returns:
        The same where it was ASCII. Letters of other scripts stay.
    """
    if text.isascii():
        return text
    text = _ROOT.sub(lambda m: f"{_ROOTS[m[1]]}{{{m[2]}}}" if m[2] else _ROOTS[m[1]], text)
    text = _UPPER_RUN.sub(lambda m: f"^{{{''.join(_UPPER[c] for c in m.group())}}}", text)
    text = _LOWER_RUN.sub(lambda m: f"_{{{''.join(_LOWER[c] for c in m.group())}}}", text)
    return "".join(c if c.isascii() else _symbol(c) for c in text)


@functools.cache
def _symbol(c: str) -> str:
    if c in _SYMBOLS:
        return _SYMBOLS[c]
    category = unicodedata.category(c)
    if category == "Zs":
        return " "
    if category == "Cf":  # joiners, direction and byte order marks
        return ""
    if category == "Nd":
        return str(unicodedata.digit(c))
    plain = unicodedata.normalize("NFKC", c)
    above, slash, below = plain.partition("⁄")
    if slash and below:
        return f"\\frac{{{above}}}{{{below}}}"  # "½"
    return plain if plain == c or len(plain) > 4 else "".join(p if p.isascii() else _SYMBOLS.get(p, p) for p in plain)
