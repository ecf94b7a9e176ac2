"""Compares the mathematical scorer with math-verify's own verdict, on true answers rewritten in many forms.

    python scripts/check_math_scores.py FOLDER [--truths 2000] [--forms 4] [--suite] [--all]

Each true answer of the real files (FOLDER, as GRPO_ENGINE_DATA) is rewritten in forms that mean the same and in forms
that do not. For each form three verdicts are compared: ours, math-verify's (parsed and verified with its defaults, the
truth in a box), and what the form was made to be. Disagreements are counted by form and shown. With --suite the truths
are those of the suite's mathematical sets, and more forms are made, as models write them.
"""

import argparse
import logging
import multiprocessing
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pebble

from grpo_engine.rewards import math as ours
from grpo_engine.tasks.files import read_problems

LIMIT_S = 40.0  # of all forms of a truth; some expressions have no end
FILES = (
    "math_curriculum/math__full_difficulty_ordered_test_500",
    "guru_verl/online_eval/math__math_500",
    "math_curriculum_sampled/math__sampled_1_4_12800",
)
SUITE = (
    "math_curriculum/math__full_difficulty_ordered_test_500", "guru_verl/online_eval/math__math_500",
    "guru_verl/online_eval/aime2024", "guru_verl/online_eval/amc2023", "guru_verl/online_eval/gsm8k",
)  # fmt: skip


def forms(truth: str, other: str) -> dict[str, tuple[str, bool]]:
    """Name to (answer, whether it is right); only those that can be made of this truth."""
    out = {
        "itself": (truth, True),
        "spaces": (re.sub(r"(?<![\\A-Za-z])([-+=,])", r" \1 ", truth), True),
        "dollars": (f"${truth}$", True),
        "another truth": (other, False),
        "empty": ("", False),
        "two answers": (f"{truth}, {other}", False),
    }
    if r"\frac" in truth:
        out["dfrac"] = truth.replace(r"\frac", r"\dfrac"), True
    if re.fullmatch(r"-?\d{1,12}", truth):
        n = int(truth)
        out |= {
            "decimal": (f"{n}.0", True), "fraction": (rf"\frac{{{2 * n}}}{{2}}", True), "sum": (f"{n - 3} + 3", True),
            "assigned": (f"x = {n}", True), "text": (rf"\text{{{n}}}", True), "unit": (rf"{n} \text{{ cm}}", True),
            "next": (str(n + 1), False), "negative": (str(-n), n == 0), "digit": (f"{n}0", n == 0),
            "tenth": (f"{n}.1", False),
        }  # fmt: skip
        if n >= 1000:
            out["thousands"] = f"{n:,}", True
    if match := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", truth):
        sign, a, b = match[1], int(match[2]), int(match[3])
        out |= {
            "slash": (f"{sign}{a}/{b}", True), "doubled": (rf"{sign}\frac{{{2 * a}}}{{{2 * b}}}", True),
            "9 decimals": (f"{(-1 if sign else 1) * a / b:.9f}", True), "inverse": (rf"{sign}\frac{{{b}}}{{{a}}}", a == b),
            "1 decimal": (f"{(-1 if sign else 1) * a / b:.1f}", abs(round(a / b, 1) - a / b) < 1e-9),
            "opposite": (rf"{'' if sign else '-'}\frac{{{a}}}{{{b}}}", a == 0),
        }  # fmt: skip
    if re.search(r"\\sqrt|\\pi", truth) and "," not in truth and "=" not in truth and "text" not in truth:
        out |= {"plus 0": (f"{truth} + 0", True), "plus 1": (f"{truth} + 1", False), "twice": (f"2({truth})", False)}
    return out


def more_forms(truth: str) -> dict[str, tuple[str, bool]]:
    """As `forms`: what models write besides LaTeX."""
    out = {"unicode minus": (truth.replace("-", "\u2212"), True)} if "-" in truth and "\\" not in truth else {}
    if r"\pi" in truth or r"\sqrt{" in truth:
        plain = re.sub(r"\\sqrt\{(\d+)\}", "√\\1", truth.replace(r"\pi", "π"))
        out["unicode"] = plain, True
    if re.fullmatch(r"-?\d{1,12}", truth):
        n = int(truth)
        out |= {
            "plain unit": (f"{n} dollars", True), "degrees": (f"{n}°", True), "power": (f"{n}e0", True),
            "million": (rf"{n} \text{{ million}}", n == 0), "hedge": (rf"{n} \text{{ (or {n + 1})}}", False),
            "false equation": (f"{n + 1} = {n}", False), "or more": (f"{n} or more", False),
        }  # fmt: skip
        if n >= 1000:
            out["spaced thousands"] = f"{n:,}".replace(",", " "), True
    if match := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", truth):
        sign, a, b = match[1], int(match[2]), int(match[3])
        if b and a > b and a % b:
            out |= {"mixed": (f"{sign}{a // b} {a % b}/{b}", True), "joined": (f"{sign}{a // b}{a % b}/{b}", False)}
    if match := re.fullmatch(r"[(\[]([^,]+),([^,]+)[)\]]", truth):
        out["turned round"] = (
            f"{truth[0]}{match[2].strip()}, {match[1].strip()}{truth[-1]}",
            match[1].strip() == match[2].strip(),
        )
    return out


def theirs(truth: str, answer: str) -> bool:
    from math_verify import parse, verify

    gold, found = (parse(rf"\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer))
    return bool(verify(gold, found, timeout_seconds=None))


def verdicts(truth: str, other: str, limit: int | None, more: bool) -> list[tuple[str, str, bool, bool, bool]]:
    """Of each form, or of `limit` drawn ones: name, answer, whether it was made to be right, our verdict, math-verify's."""
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ours.spelling(other) == ours.spelling(truth):
        return []
    problem = SimpleNamespace(answer=truth, info={})
    made = [*forms(truth, other).items(), *(more_forms(truth).items() if more else ())]
    if limit is not None:
        made = random.Random(truth).sample(made, min(limit, len(made)))
    return [
        (form, answer, wanted, ours.score(rf"\boxed{{{answer}}}", problem) == 1.0, theirs(truth, answer))
        for form, (answer, wanted) in made
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--truths", type=int, default=2000)
    parser.add_argument("--forms", type=int, help="of each truth, drawn; none: all")
    parser.add_argument("--suite", action="store_true", help="the suite's truths, and more forms")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="show every disagreement, not three of each form")
    arguments = parser.parse_args()
    files = SUITE if arguments.suite else FILES
    answers = {ours.gold_text(p.answer) for file in files for p in read_problems(arguments.folder / f"{file}.parquet")}
    rng = random.Random(0)
    truths = rng.sample(sorted(answers), min(arguments.truths, len(answers)))
    counts: Counter = Counter()
    shown = defaultdict(list)
    with pebble.ProcessPool(max_workers=arguments.workers, context=multiprocessing.get_context("spawn")) as pool:
        asked = [
            (
                truth,
                pool.schedule(verdicts, args=[truth, rng.choice(truths), arguments.forms, arguments.suite], timeout=LIMIT_S),
            )
            for truth in truths
        ]
        for truth, future in asked:
            try:
                found = future.result()
            except TimeoutError:
                counts["truths out of time"] += 1
                shown["out of time", None, None, None].append((truth, ""))
                continue
            for form, answer, wanted, mine, verdict in found:
                counts["forms"] += 1
                counts["as math-verify"] += mine == verdict
                counts["ours as made"] += mine == wanted
                counts["math-verify as made"] += verdict == wanted
                kind = "right" if wanted else "wrong"
                counts[f"made {kind}"] += 1
                counts[f"made {kind}, ours not"] += mine != wanted
                counts[f"made {kind}, math-verify not"] += verdict != wanted
                if mine != verdict or mine != wanted:
                    shown[form, wanted, mine, verdict].append((truth, answer))
    print(f"{len(truths)} truths: {dict(counts)}")
    for (form, wanted, mine, verdict), cases in sorted(shown.items(), key=lambda item: -len(item[1])):
        print(f"{len(cases):5} {form}: made {wanted}, ours {mine}, math-verify {verdict}")
        for truth, answer in cases if arguments.all else cases[:3]:
            print(f"        {truth!r} <- {answer!r}")


if __name__ == "__main__":
    main()
