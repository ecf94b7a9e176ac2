"""Output for consoles that lack UTF-8."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_PLAIN = {"−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "→": "->", "…": "..."}


def _plainer(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _ascii(c) for c in text), error.end


def _ascii(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"


codecs.register_error("plainer", _plainer)


def allow_any_text() -> None:
    """Lets standard output and error print any text: what their encoding lacks is written in ASCII, a minus as "-"."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plainer")
