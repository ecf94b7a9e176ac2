"""Several sets of problems answered in one go, resumable, with every answer kept and a table of what is right.

A suite's folder holds

    suite.json        resolved configuration, fingerprints of the weights and the sets' files, number of problems
    answers.jsonl     one `Answer` a line, in the order in which they were scored; a kill costs what is not in it
    problems.parquet  one row a problem: values, lengths and how each of its answers ended
    table.json, table.md

An answer depends on its prompt, its seed and the weights alone, so a suite that was killed and started again gives the
same table, byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grpo_engine.config import RunConfig
from grpo_engine.evaluate.evaluate import evaluation_seeds
from grpo_engine.evaluate.intervals import CONFIDENCE, interval
from grpo_engine.load import Policy, load_policy, model_files
from grpo_engine.model.hub import FILES
from grpo_engine.records import jsonl
from grpo_engine.records.text_table import Table
from grpo_engine.rewards.answers import common_form
from grpo_engine.rewards.choice import chosen_letter
from grpo_engine.rewards.extract import after_thinking, last_boxed
from grpo_engine.rewards.pool import RewardPool, reward_pool
from grpo_engine.rollout.engine import Engine, Progress, SamplingRequest
from grpo_engine.system import device
from grpo_engine.system.files import fingerprint, make_folder, write_bytes_atomic
from grpo_engine.system.locks import LOCK_FILE, locked
from grpo_engine.tasks.files import read_problems
from grpo_engine.tasks.rows import find_files
from grpo_engine.types import Problem, Reward

SUITES: dict[str, dict[str, str]] = {  # name of a set to its file in the data folder
    "paper": {
        "holdout": "math_curriculum/math__full_difficulty_ordered_test_500.parquet",
        "aime2024": "guru_verl/online_eval/aime2024.parquet",
        "amc2023": "guru_verl/online_eval/amc2023.parquet",
        "humaneval": "guru_verl/online_eval/codegen__humaneval_164.parquet",
        "gsm8k": "guru_verl/online_eval/gsm8k.parquet",
        "zebra": "guru_verl/online_eval/logic__zebra_puzzle_dataset_200.parquet",
        "math500": "guru_verl/online_eval/math__math_500.parquet",
        "supergpqa": "guru_verl/online_eval/stem__supergpqa_200.parquet",
    }
}
SUITE_FILE, ANSWERS_FILE, PROBLEMS_FILE = "suite.json", "answers.jsonl", "problems.parquet"
DRAWS = 2000  # of the bootstrap over problems


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One scored answer."""

    eval_set: str
    problem: int  # index in its set
    sample: int  # 0 to n - 1
    value: float  # in [0, 1]
    status: str  # of the scorer: "ok", "timeout", "crash", "error"
    finish: str  # "stop", "length", or "prompt" where the prompt left no room for an answer
    tokens: int  # stop token included
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SetResult:
    """One set. `score` counts a grid's right cells, pass@k and maj@k only what is right throughout (value 1)."""

    eval_set: str
    problems: int
    samples: int  # n answers to each
    score: float  # mean over problems of the mean value
    stderr: float | None  # of score, over problems; None for one problem
    low: float  # 95 % interval of score, bootstrap over problems
    high: float
    pass_at: dict[str, float]  # k to the unbiased estimate, k = 1, 2, 4, ... n
    maj_at: dict[str, float] | None  # k to the share of problems whose most frequent answer is right; None for programs
    mean_tokens: float
    median_tokens: float
    p95_tokens: float
    truncated: float  # share of answers that ended for want of room, of prompts without room included
    no_room: int  # problems whose prompt left no room; their answers are worth 0
    failures: int  # answers whose scorer timed out, crashed or raised; worth 0


def suite_files(name: str, data: Path | str) -> dict[str, str]:
    """The files of a suite.

    Args:
        name: of `SUITES`.
        data: folder that holds them.

    Returns:
        Name of a set to its file.

    Raises:
        ValueError: no such suite.
        FileNotFoundError: no such file.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}: there is {', '.join(SUITES)}")
    files = {eval_set: Path(data) / file for eval_set, file in SUITES[name].items()}
    if missing := [str(file) for file in files.values() if not file.is_file()]:
        raise FileNotFoundError(f"suite {name}: no file {missing[0]}; --data names the folder of the problems")
    return {eval_set: str(file.resolve()) for eval_set, file in files.items()}


def evaluate_suite(config: RunConfig, out: Path | str, *, progress: Progress | None = None) -> list[SetResult]:
    """Answers the sets of a configuration, or what is left of them, scores the answers and writes the tables.

    Args:
        config: model, task.evals, task.eval_problems, evaluation.temperature and .samples, rollout limits, reward and
            seed are read.
        out: the suite's folder; made when absent, and gone on with when it holds the same suite.
        progress: of the rollout: answers finished, answers that were missing.

    Returns:
        One result for each set.

    Raises:
        ValueError: no set, a bad file, a reward.function, or a folder that holds another suite.
        RuntimeError: see `RewardPool`; `Locked`: another process answers this suite.
    """
    if not config.task.evals:
        raise ValueError("evaluate_suite: task.evals names no set")
    if config.reward.function is not None:
        raise ValueError("evaluate_suite: reward.function is for runs; a suite keeps the scorers of its sets")
    config = config.model_copy(update={"device": device.resolve(config.device)})
    source = model_files(config.model)
    sets = {
        name: read_problems(
            file, limit=config.task.eval_problems, scoring=config.reward.scoring, scorer=config.reward.scorer
        )
        for name, file in config.task.evals.items()
    }
    out = make_folder(out)
    what = {
        "config": config.model_dump(mode="json"),
        "weights": fingerprint(source.folder, patterns=FILES, sampled=True) if source else None,
        "problems": {name: len(problems) for name, problems in sets.items()},
        "data": {name: fingerprint(*find_files(paths)) for name, paths in config.task.evals.items()},
    }
    with locked(out / LOCK_FILE, f"{out}: another process answers this suite"):
        _claim(out, what)
        done = _done(out / ANSWERS_FILE, sets, config.evaluation.samples)
        if len(done) < config.evaluation.samples * sum(map(len, sets.values())):
            policy = load_policy(config, source)
            with reward_pool(config.reward) as pool:
                done |= _answer(policy, sets, done, out, pool, config, progress)
        results = [_result(name, problems, done, config) for name, problems in sets.items()]
        _write(out, results, sets, done, config)
    return results


def pass_at_k(right: Sequence[int], samples: int, k: int) -> float:
    """The chance that at least one of k answers is right, unbiased (Chen et al. 2021, https://arxiv.org/abs/2107.03374).

    Args:
        right: of each problem, how many of its answers are right.
        samples: n answers to each.
        k: 1 to n.

    Returns:
        The mean over problems of 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: k outside of [1, n], or a count outside of [0, n].
    """
    if not 1 <= k <= samples or not all(0 <= c <= samples for c in right):
        raise ValueError(f"pass_at_k: k must be in [1, {samples}] and counts in [0, {samples}], got k={k}, {right}")
    all_ways = math.comb(samples, k)
    return sum(1.0 - math.comb(samples - c, k) / all_ways for c in right) / len(right)


def majority(votes: Sequence[str | None], right: Sequence[bool]) -> float:
    """What the most frequent answer is worth.

    Args:
        votes: what each response answers, in one spelling; None does not vote.
        right: whether it is right. Of responses with one spelling, the first decides.

    Returns:
        1.0 or 0.0; where several answers are the most frequent, the share of them that are right; 0.0 without a vote.
    """
    counts: dict[str, list[bool]] = defaultdict(list)
    for vote, value in zip(votes, right, strict=True):
        if vote is not None:
            counts[vote].append(value)
    most = max(map(len, counts.values()), default=0)
    best = [values[0] for values in counts.values() if len(values) == most]
    return sum(best) / len(best) if best else 0.0


def _claim(out: Path, suite: Mapping[str, object]) -> None:
    path = out / SUITE_FILE
    if path.exists():
        before = jsonl.read_object(path)
        if before != suite:
            names = ", ".join(name for name in suite if before.get(name) != suite[name])
            raise ValueError(f"{path}: another suite, model or setting than asked for ({names} differ); give another folder")
    else:
        write_bytes_atomic(path, (json.dumps(suite, indent=1) + "\n").encode())


Done = dict[tuple[str, int, int], Answer]


def _done(path: Path, sets: Mapping[str, Sequence[Problem]], samples: int) -> Done:
    """The answers of whole problems; the file then holds no others, and no torn line."""
    if not path.exists():
        return {}
    answers = [Answer(**record) for record in jsonl.read_jsonl(path, allow_torn=True).records]
    by_problem: dict[tuple[str, int], dict[int, Answer]] = defaultdict(dict)
    for a in answers:
        by_problem[a.eval_set, a.problem][a.sample] = a
    kept = {(*position, s): a for position, of in by_problem.items() if len(of) == samples for s, a in of.items()}
    write_bytes_atomic(path, "".join(map(_line, kept.values())).encode())
    return kept


def _line(answer: Answer) -> str:
    return json.dumps(dataclasses.asdict(answer)) + "\n"


def _answer(
    policy: Policy,
    sets: Mapping[str, Sequence[Problem]],
    done: Done,
    out: Path,
    pool: RewardPool,
    config: RunConfig,
    progress: Progress | None,
) -> Done:
    """Answers what is not done: all sets in one rollout, each answer written when it is scored."""
    engine, tokenizer, encode = Engine(policy.model), policy.tokenizer, policy.encode
    G, longest = config.evaluation.samples, policy.model.config.max_position_embeddings - config.rollout.max_new_tokens
    if config.rollout.max_prompt_tokens is not None:
        longest = min(longest, config.rollout.max_prompt_tokens)
    requests: list[SamplingRequest] = []
    positions: list[tuple[str, int]] = []  # (set, index) of each prompt
    new: Done = {}
    with (out / ANSWERS_FILE).open("a", encoding="utf-8") as file:

        def keep(answer: Answer) -> None:
            new[answer.eval_set, answer.problem, answer.sample] = answer
            file.write(_line(answer))
            file.flush()

        for name, problems in sets.items():
            seeds = evaluation_seeds(config.seed, name, count=len(problems) * G).view(-1, G)
            prompts, chosen = [], []
            for i, problem in enumerate(problems):
                if (name, i, 0) in done:
                    continue
                prompt = encode(problem)
                if len(prompt) > longest:
                    nothing: dict[str, Any] = {"value": 0.0, "status": "ok", "finish": "prompt", "tokens": 0, "text": ""}
                    for sample in range(G):
                        keep(Answer(eval_set=name, problem=i, sample=sample, **nothing))
                    continue
                prompts.append(prompt)
                chosen.append(i)
                positions.append((name, i))
            if prompts:
                requests.append(
                    SamplingRequest(
                        prompts=prompts,
                        group_size=G,
                        seeds=seeds[chosen].flatten(),
                        temperature=config.evaluation.temperature,
                        max_new_tokens=config.rollout.max_new_tokens,
                    )
                )
        pending: dict[int, tuple[str, int, str]] = {}  # text, tokens, finish

        def on_scored(sequence: int, reward: Reward) -> None:
            (name, i), (text, tokens, finish) = positions[sequence // G], pending.pop(sequence)
            keep(Answer(eval_set=name, problem=i, sample=sequence % G, value=reward.value, status=reward.status,
                        finish=finish, tokens=tokens, text=text))  # fmt: skip

        with pool.begin([sets[name][i] for name, i in positions for _ in range(G)], on_scored=on_scored) as scoring:
            if requests:
                sampling = engine.stream(requests, stop_ids=tokenizer.stop_ids, config=config.rollout, progress=progress)
                for sequences, responses in sampling:
                    texts = [tokenizer.decode(response) for response in responses]
                    for sequence, response, text in zip(sequences, responses, texts, strict=True):
                        finish = "stop" if response and response[-1] in tokenizer.stop_ids else "length"
                        pending[sequence] = text, len(response), finish
                    scoring.add(sequences, texts)
            scoring.finish()
    return new


def _vote(problem: Problem, text: str) -> str | None:
    kind = problem.reward.removeprefix("paper_")
    if kind == "choice":
        return chosen_letter(text)
    if kind == "logic":
        found = re.findall(r"<answer>(.*?)</answer>", after_thinking(text), re.DOTALL)
        return "".join(found[-1].split()).lower() if found else None
    boxed = last_boxed(after_thinking(text))
    return None if boxed is None else common_form(boxed)


def _result(name: str, problems: Sequence[Problem], done: Done, config: RunConfig) -> SetResult:
    P, G = len(problems), config.evaluation.samples
    answers = [[done[name, i, s] for s in range(G)] for i in range(P)]
    flat = [a for row in answers for a in row]
    values = np.array([[a.value for a in row] for row in answers])
    right, means = values == 1.0, values.mean(axis=1)
    tokens = np.array([a.tokens for a in flat])
    drawn = np.random.default_rng([config.seed, P]).integers(P, size=(DRAWS, P))
    low, high = interval(means[drawn].mean(axis=1))
    ks = [1 << i for i in range(G.bit_length()) if 1 << i <= G]
    maj_at = None
    if not problems[0].reward.endswith("code"):
        votes = [[_vote(p, a.text) for a in row] for p, row in zip(problems, answers, strict=True)]
        maj_at = {str(k): sum(majority(v[:k], r[:k]) for v, r in zip(votes, right, strict=True)) / P for k in ks}
    return SetResult(
        eval_set=name,
        problems=P,
        samples=G,
        score=float(means.mean()),
        stderr=float(means.std(ddof=1)) / math.sqrt(P) if P > 1 else None,
        low=float(low),
        high=float(high),
        pass_at={str(k): pass_at_k(right.sum(axis=1).tolist(), G, k) for k in ks},
        maj_at=maj_at,
        mean_tokens=float(tokens.mean()),
        median_tokens=float(np.median(tokens)),
        p95_tokens=float(np.quantile(tokens, 0.95)),
        truncated=sum(a.finish != "stop" for a in flat) / len(flat),
        no_room=sum(row[0].finish == "prompt" for row in answers),
        failures=sum(a.status != "ok" for a in flat),
    )


def _write(
    out: Path, results: Sequence[SetResult], sets: Mapping[str, Sequence[Problem]], done: Done, config: RunConfig
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = []
    for name, problems in sets.items():
        for i, problem in enumerate(problems):
            answers = [done[name, i, s] for s in range(config.evaluation.samples)]
            rows.append({
                "eval_set": name, "uid": problem.uid, "problem": i, "pass_rate": problem.info.get("pass_rate"),
                "score": sum(a.value for a in answers) / len(answers), "right": sum(a.value == 1.0 for a in answers),
                **{f: [getattr(a, f) for a in answers] for f in ("value", "status", "finish", "tokens")},
            })  # fmt: skip
    temporary = out / f"{PROBLEMS_FILE}.tmp"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.replace(out / PROBLEMS_FILE)
    e = config.evaluation
    title = f"{config.model.path}: {e.samples} answers a problem at temperature {e.temperature}"
    if config.reward.scoring == "paper":
        title += ", scored as by the paper's code"
    for file, text in (
        ("table.json", json.dumps([dataclasses.asdict(r) for r in results], indent=1) + "\n"),
        ("table.md", "\n".join([f"# {title}", "", *(table.markdown() for table in tables(results))])),
    ):
        write_bytes_atomic(out / file, text.encode())


def tables(results: Sequence[SetResult]) -> tuple[Table, Table]:
    """What the tables of a suite say.

    Args:
        results: of its sets.

    Returns:
        One row of scores in percent with a column a set, as the paper shows a model; and one row a set with the rest.
    """
    percent = lambda x: f"{100 * x:.1f}"  # noqa: E731
    error = lambda r: "" if r.stderr is None else f" ± {percent(r.stderr)}"  # noqa: E731
    ks = list(results[0].pass_at)
    heads = ["set", "problems", "score", f"{CONFIDENCE:.0%} interval", "test loss", *(f"pass@{k}" for k in ks),
             *(f"maj@{k}" for k in ks[1:]), "tokens: mean", "median", "95 %", "cut off", "no room", "failures"]  # fmt: skip
    rows = [
        [r.eval_set, str(r.problems), percent(r.score) + error(r), f"{percent(r.low)} to {percent(r.high)}",
         f"{1 - r.score:.3f}", *(percent(r.pass_at[k]) for k in ks),
         *(percent(r.maj_at[k]) if r.maj_at else "-" for k in ks[1:]),
         f"{r.mean_tokens:.0f}", f"{r.median_tokens:.0f}", f"{r.p95_tokens:.0f}", percent(r.truncated) + " %",
         str(r.no_room), str(r.failures)]
        for r in results
    ]  # fmt: skip
    scores = [percent(r.score) + error(r) for r in results]
    names = [r.eval_set for r in results]
    return Table(name="scores", head=names, rows=[scores], text_columns=0), Table(name="sets", head=heads, rows=rows)
