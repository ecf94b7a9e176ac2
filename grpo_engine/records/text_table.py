"""A table of text, and the one writer of it: Markdown and LaTeX, of evaluations and of studies alike."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows of text under a head."""

    name: str  # file name, without ending
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    text_columns: int = 1  # the first so many are text, as is what is in `wide`; the rest are numbers
    wide: Sequence[str] = ()  # columns of sentences, by their heads
    note: str = ""
    summary: str = ""  # folded away under this line, when given

    def is_text(self, column: int) -> bool:
        """Whether a column is aligned to the left."""
        return column < self.text_columns or self.head[column] in self.wide

    def markdown(self) -> str:
        """The table for a README or an issue: GitHub's pipes, the title above, the note below."""
        rule = ["---" if self.is_text(i) else "---:" for i in range(len(self.head))]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]
        return "\n".join([*([self.title, ""] if self.title else []), *lines, *(["", self.note] if self.note else []), ""])

    def latex(self) -> str:
        """The table for a paper: a tabular of the package booktabs, the title as its caption, the note below."""
        columns = "".join(
            r"p{0.2\linewidth}" if name in self.wide else "l" if self.is_text(i) else "r" for i, name in enumerate(self.head)
        )
        head, *rows = (" & ".join(map(_latex, row)) + r" \\" for row in (self.head, *self.rows))
        lines = [r"\begin{table}", r"\centering", *([rf"\caption{{{_latex(self.title)}}}"] if self.title else []),
                 rf"\label{{tab:{self.name}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows,
                 r"\bottomrule", r"\end{tabular}", *([rf"\par\smallskip {_latex(self.note)}"] if self.note else []),
                 r"\end{table}"]  # fmt: skip
        return "\n".join(lines) + "\n"


_SPECIAL = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "\u00a0": "~", "\u2212": "$-$", "\u00b1": r"$\pm$", "\u00b2": "$^2$", "\u00b7": r"$\cdot$", "\u03c4": r"$\tau$",
    "\u201c": "``", "\u201d": "''",
}  # fmt: skip
_POWER = re.compile("[\u207b\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{2,}|[\u207b\u2070\u00b9\u00b3\u2074-\u2079]")
_PLAIN = str.maketrans("\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "-0123456789")


def _latex(text: str) -> str:
    """Text as LaTeX shows it: special characters escaped, signs and raised numbers as mathematics."""
    parts, at = [], 0
    for power in _POWER.finditer(text):
        parts += [_SPECIAL.get(c, c) for c in text[at : power.start()]]
        parts.append(f"$^{{{power.group().translate(_PLAIN)}}}$")
        at = power.end()
    return "".join([*parts, *(_SPECIAL.get(c, c) for c in text[at:])])
