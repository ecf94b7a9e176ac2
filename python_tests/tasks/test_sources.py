"""Data sources by name, and a scorer that is chosen where the name is unknown."""

import json

import pytest

from grpo_engine.config import TaskConfig, load_run_config
from grpo_engine.load import load_task
from grpo_engine.rewards import SCORERS
from grpo_engine.tasks.files import DATA_SOURCES, data_source_of, read_problems


def mine(response, problem):
    """A scorer of one's own."""
    return float(response == problem.answer)


MINE = f"{__name__}:mine"
KNOWN = """
    DigitalLearningGmbH/MATH-lighteval math_dapo math_dapo_reasoning HuggingFaceH4/MATH-500 lighteval/MATH
    lighteval/MATH-Hard math-ai/aime24 math-ai/aime25 math-ai/amc23 math-ai/math500 math-ai/minervamath math-ai/olympiadbench
    math-ai/gsm8k BytedTsinghua-SIA/DAPO-Math-17k BytedTsinghua-SIA/AIME-2024 open-r1/DAPO-Math-17k-Processed math
    agentica-org/DeepScaleR-Preview-Dataset deepscaler SynthLabsAI/Big-Math-RL-Verified big_math
    open-r1/Big-Math-RL-Verified-Processed AI-MO/NuminaMath-CoT AI-MO/NuminaMath-1.5 AI-MO/aimo-validation-aime
    numina_aops_forum numina_synthetic_math numina_amc_aime numina_synthetic_amc numina_cn_k12 numina_olympiads
    openai/gsm8k gsm8k madrylab/gsm8k-platinum EleutherAI/hendrycks_math hendrycks/competition_math
    aime2024 AIME_2025 HuggingFaceH4/aime_2024 aimeamc2023 amc23 math__math_500 zwhe99/DeepMath-103K
""".split()  # fmt: skip


@pytest.mark.parametrize("source", KNOWN)
def test_a_source_of_mathematics_is_known_in_any_case(source):
    for name in (source, source.lower(), source.upper()):
        family = data_source_of(name)
        assert (family.domain, family.reward) == ("math", "math") and family.paper in SCORERS


@pytest.mark.parametrize(
    "source", ["poetry", "", "hiyouga/geometry3k", "codecontests", "searchR1_nq", "mathematica", "logic"]
)
def test_a_source_that_is_unknown_says_how_to_choose(source):
    with pytest.raises(ValueError) as error:
        data_source_of(source)
    for said in (f"unknown data_source {source!r}", "reward.scorer=math", "reward.function=module:function", "math-ai/*"):
        assert said in str(error.value)


def test_families_come_in_the_order_in_which_they_are_tried():
    assert [data_source_of(name).paper for name in ("aime2024", "openai/gsm8k", "math__x", "stem__supergpqa_200")] == [
        "paper_aime", "paper_gsm8k", "paper_math", "paper_choice"
    ]  # fmt: skip
    assert {family.reward for family in DATA_SOURCES.values()} <= SCORERS.keys()


# ------------------------------------------------------------------ a scorer of the user's choice


def verl(source, truth, **changes):
    return {"data_source": source, "prompt": [{"role": "user", "content": "?"}], "reward_model": {"ground_truth": truth},
            **changes}  # fmt: skip


@pytest.fixture
def task(tmp_path):
    def load(rows, *settings):
        path = tmp_path / "p.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = load_run_config(None, ["task.name=files", f"task.train={path}", *settings])
        return [*load_task(config.task, seed=0, needed=1, reward=config.reward).train]

    return load


def test_an_unknown_source_with_a_scorer_by_name(task):
    (p,) = task([verl("my/own", 7)], "reward.scorer=math")
    assert (p.reward, p.domain, p.answer, p.info["data_source"]) == ("math", "math", "7", "my/own")
    (p,) = task([verl("my/own", "x")], "reward.scorer=exact")
    assert (p.reward, p.domain) == ("exact", "my/own")
    with pytest.raises(ValueError, match="ground_truth must be a letter A to J"):
        task([verl("my/own", "7")], "reward.scorer=choice")
    with pytest.raises(ValueError, match=r"p.jsonl: line 1: unknown data_source 'my/own': choose"):
        task([verl("my/own", "7")])


def test_a_scorer_by_source(task):
    rows = [verl("my/own", "B"), verl("openai/gsm8k", "7"), verl("other", "x")]
    found = task(rows, f"reward.scorer={{my/*: choice, other: '{MINE}'}}")
    assert [(p.reward, p.domain) for p in found] == [("choice", "stem"), ("math", "math"), (MINE, "other")]
    (p,) = task([rows[1]], "reward.scorer={OpenAI/*: exact}")  # it comes before the table
    assert (p.reward, p.domain) == ("exact", "math")
    with pytest.raises(ValueError, match="unknown data_source 'other'"):
        task(rows, "reward.scorer={my/*: choice}")


@pytest.mark.parametrize("truth", ["x", 7, ["a", "b"], {"target": 24, "numbers": [1, 2]}, True])
def test_a_function_of_the_users_scores_what_no_table_knows(task, truth):
    (p,) = task([verl("countdown", truth)], f"reward.function={MINE}")
    assert (p.reward, p.domain) == (MINE, "countdown")
    assert p.answer == (truth if isinstance(truth, str) else json.dumps(truth))
    (p,) = task([verl("stem__supergpqa", truth)], f"reward.function={MINE}")  # a known source's answers may be others
    assert (p.reward, p.domain) == (MINE, "stem")


def test_a_row_without_a_source_and_a_choice_for_all(task):
    row = verl("", "7")
    for changed in (row, {k: v for k, v in row.items() if k != "data_source"}, row | {"data_source": None}):
        (p,) = task([changed], f"reward.function={MINE}")
        assert (p.info["data_source"], p.domain) == ("own", "own")
    (p,) = task([{"question": "?", "answer": "7"}], "reward.scorer=exact")
    assert (p.reward, p.info["data_source"]) == ("exact", "own")


def test_deepscalers_rows_have_an_empty_source(task):
    (p,) = task([verl("", "7", ability="math")])
    assert (p.reward, p.info["data_source"]) == ("math", "math__plain")
    with pytest.raises(ValueError, match="unknown data_source ''"):
        task([verl("", "7", ability="code")])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["reward.scorer=maths"], "reward.scorer: no scorer 'maths': there are choice, code, exact"),
        (["reward.scorer={my/own: maths}"], "reward.scorer: no scorer 'maths'"),
        (["reward.scorer=math", f"reward.function={MINE}"], "give scorer or function, not both"),
        (["reward.scorer=nowhere:f"], "reward.scorer=nowhere:f: .*PYTHONPATH"),
    ],
)
def test_a_choice_that_is_none_is_named(task, settings, said):
    with pytest.raises(ValueError, match=said):
        task([verl("my/own", "7")], *settings)


def test_a_scorer_for_generated_problems():
    config = load_run_config(None, ["reward.scorer=math", "task.eval_problems=2"])
    found = load_task(config.task, seed=0, needed=2, reward=config.reward)
    assert {p.reward for p in [*found.train, *(p for s in found.evals.values() for p in s.problems)]} == {"math"}
    config = load_run_config(None, ["reward.scorer={a: math}"])
    with pytest.raises(ValueError, match="by data_source belongs to task.name=files"):
        load_task(TaskConfig(), seed=0, needed=1, reward=config.reward)


def test_the_sources_of_verls_files(real_data):
    for name in ("gsm8k", "math"):
        (source,) = {p.info["data_source"] for p in read_problems(f"{real_data / name}:test")}
        assert source in KNOWN
