"""The English of the documents: no long sentence, and a README that can be read in a minute."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_WORDS = 30  # aim at 25
README_LINES = 100
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
)


def paragraphs(text: str) -> list[str]:
    """The prose of a page: paragraphs, headings and items of lists; no code, tables or pictures."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    text = re.sub(r"^ *\|.*$", "", text, flags=re.M)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # of a link its words
    text = re.sub(r"^ *(?:[-*]|\d+\.|#+|>) +", "\n\n", text, flags=re.M)
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [re.sub(r"`[^`]*`", "CODE", part) for part in parts]  # a name, a command: one word


def sentences(text: str) -> list[str]:
    """Sentences end with a full stop, a question or an exclamation mark before white space; colons do not end one."""
    parts = (re.split(r"(?<=[.?!])[*_\")]*\s+", paragraph) for paragraph in paragraphs(text))
    return [part for parts_of_one in parts for part in parts_of_one]


def words(sentence: str) -> int:
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def too_long(text: str) -> list[str]:
    return [f"{words(s)} words: {s}" for s in sentences(text) if words(s) > MOST_WORDS]


@pytest.mark.parametrize("page", PAGES)
def test_no_sentence_is_long(page):
    assert too_long((ROOT / page).read_text()) == []


def test_all_pages_are_read():
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/study.md", "docs/notebook.md"} <= set(PAGES)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize(
    "text",
    [
        "word " * (MOST_WORDS + 1) + ".",
        "- a short item\n- " + "word " * (MOST_WORDS + 1),
        "# " + "word " * (MOST_WORDS + 1),
        "**Bold.** " + "`a code span` " * (MOST_WORDS + 1),
        "one ` alone\n\n" + "word " * (MOST_WORDS + 1) + "\n\nand ` another",
        "word\n" * 20 + "[a link of several words](page.md) " * 3,
    ],
)
def test_a_long_sentence_is_found(text):
    assert len(too_long(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "word " * MOST_WORDS + ".\nNext sentence.",
        "| " + "word " * 50 + "|",
        "```\n" + "word " * 50 + "\n```",
        "![" + "word " * 50 + "](picture.png)",
        "word " * 20 + "\n\n- " + "word " * 20,
        "`" + "word " * 50 + "`",
    ],
)
def test_tables_code_and_short_sentences_pass(text):
    assert too_long(text) == []
