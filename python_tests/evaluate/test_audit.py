"""The audit of the verifier: files as peers write them, verdicts side by side."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet as pq
import pytest

from grpo_engine.evaluate.audit import audit, summary, table, write_verdicts

ROWS = [("5/4", r"so \boxed{1 1/4}"), ("7", r"so \boxed{8}"), ("1, 2", r"so \boxed{2, 1}")]
OURS = [1.0, 0.0, 1.0]
FORMS = {
    "verl": lambda t, r: {"input": "q", "output": r, "gts": t, "score": 0.0, "step": 3},
    "lm_eval": lambda t, r: {"doc": {"answer": t}, "resps": [[r]], "exact_match": 1},
    "trl": lambda t, r: {"completion": [{"role": "assistant", "content": r}], "solution": t},
    "plain": lambda t, r: {"truth": t, "answer": r},
    "several": lambda t, r: {"reward_model": {"ground_truth": t, "style": "rule"}, "responses": [r]},
}


def written(tmp_path, rows, ending="jsonl"):
    path = tmp_path / f"answers.{ending}"
    if ending == "parquet":
        pq.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(verdicts, name):
    return [v.scores[name] for v in verdicts]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_fields_are_found_under_the_names_of_peers(tmp_path, form, ending):
    path = written(tmp_path, [FORMS[form](t, r) for t, r in ROWS], ending)
    verdicts = audit(path, beside=[], workers=1)
    assert values(verdicts, "math") == OURS and [v.truth for v in verdicts] == [t for t, _ in ROWS]
    assert [v.file for v in verdicts] == [{"verl": 0.0, "lm_eval": 1.0}.get(form)] * 3


def test_math_verify_stands_beside_and_disagreements_are_shown(tmp_path):
    verdicts = audit(written(tmp_path, [FORMS["plain"](t, r) for t, r in ROWS]), workers=1, timeout_s=30)
    assert values(verdicts, "math_verify") == [0.0, 0.0, 1.0]
    assert [v.agreed for v in verdicts] == [False, True, True]
    assert table(verdicts)[1] == ["line 1", "5/4", "1 1/4", "1", "0"]
    head, ours, theirs = summary(verdicts)
    assert head[-2:] == ["right, not ours", "ours, not right"]
    assert ours[:4] == ["math", "2 of 3", "0.6667", "0"] and theirs[1] == "1 of 3" and theirs[-3:] == ["2", "0", "1"]
    write_verdicts(tmp_path / "out" / "v.jsonl", verdicts)
    back = [json.loads(line) for line in (tmp_path / "out" / "v.jsonl").read_text().splitlines()]
    assert back[0]["scores"] == {"math": 1.0, "math_verify": 0.0} and len(back) == 3


def test_another_scorer_where_it_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "packages/verl/utils/reward_score"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    package.joinpath("prime_math.py").write_text("def compute_score(text, truth):\n    return truth in text, True, text\n")
    package.joinpath("math_reward.py").write_text(
        "def compute_score(text, truth):\n    return {'score': -1.0, 'acc': False}\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    path = written(tmp_path, [FORMS["plain"](t, r) for t, r in [*ROWS, ("8", r"\boxed{8}")]])
    verdicts = audit(path, beside=["verl_prime", "verl_math", "exact"], workers=1)
    assert values(verdicts, "verl_prime") == [0.0, 0.0, 0.0, 1.0] and values(verdicts, "verl_math") == [0.0] * 4
    assert {s for v in verdicts for s in v.statuses.values()} == {"ok"}


def test_numbers_of_a_file_and_bare_answers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"pred": "0.00001", "gold": 0.00001}\n{"pred": "x > 5", "gold": "(5, \\\\infty)"}\n')
    verdicts = audit(path, response="pred", truth="gold", bare=True, beside=[], workers=1)
    assert [v.truth for v in verdicts] == ["0.00001", r"(5, \infty)"] and values(verdicts, "math") == [1.0, 1.0]
    assert len(audit(path, response="pred", bare=True, beside=[], workers=1, limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"a": "1", "truth": "1"}, {}, "--response names it; there are a, truth|no field of response"),
        ({"response": "1"}, {}, "no field of truth.*--truth names it"),
        ({"response": "1", "truth": "1"}, {"response": "b"}, "--response b: no such field; there are response, truth"),
        ({"response": 1, "truth": "1"}, {"response": "response"}, "response must be text or a list of texts, got int"),
        ({"response": "1", "truth": " "}, {"truth": "truth"}, "line 1: truth holds no truth"),
        ({"response": "1", "truth": "1"}, {"beside": ["marth"]}, "no scorer 'marth'.*of others math_verify"),
        ({"response": "1", "truth": "1"}, {"beside": ["lm_eval"]}, "lm_eval: lm_eval is not installed"),
        ({"response": "1", "truth": "1"}, {"limit": 0}, "limit must be at least 1"),
    ],
)
def test_errors_name_what_is_wrong(tmp_path, row, options, says, monkeypatch):
    monkeypatch.setattr("grpo_engine.evaluate.audit.installed", lambda: ["math_verify"])
    with pytest.raises(ValueError, match=says):
        audit(written(tmp_path, [row]), workers=1, **options)


def test_the_command(tmp_path):
    path = written(tmp_path, [FORMS["verl"](t, r) for t, r in ROWS])
    command = [
        sys.executable,
        "-m",
        "grpo_engine",
        "score",
        str(path),
        "--beside",
        "exact",
        "--out",
        str(tmp_path / "v.jsonl"),
    ]
    result = subprocess.run([*command, "--workers", "1"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "disagreements" in result.stdout and "3 responses, 2 disagreements" in result.stdout
    assert len((tmp_path / "v.jsonl").read_text().splitlines()) == 3
