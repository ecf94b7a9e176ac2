"""Trains on real problems from end to end, kills the run once, and compares it with one that nobody disturbed.

    python scripts/check_real_problems.py FOLDER --out runs/real_problems [--threads 2]

From the 12,800 problems of FOLDER (as GRPO_ENGINE_DATA): a byte-pair tokenizer, a Qwen2 model of five million parameters
that reads part of their text with their answers, saved as transformers saves it, and 20 steps of `grpo-engine train`
on them with held-out evaluation. The run is killed by SIGKILL in the middle and started again; a second run is not. It
fails unless the records of both are complete and the same, byte for byte, as are their weights. Started again after
being stopped itself, it goes on; `report.json` has the figures. About six minutes on two cores.

A model of this size that has read so little solves next to none of these problems: the check is of the machinery.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from grpo_engine.evaluate.suite import SUITES
from grpo_engine.load import load_tokenizer
from grpo_engine.model import weights
from grpo_engine.model.config import ModelConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import Tokenizer, train_bpe
from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import COST_HEAD, cost_rows, total_cost
from grpo_engine.system import files
from grpo_engine.tasks.files import read_problems
from grpo_engine.train.language import DocumentBatch, language_loss, train_language
from grpo_engine.train.schedule import Schedule
from grpo_engine.types import Problem

TRAIN = "math_curriculum_sampled/math__sampled_1_4_12800.parquet"
HELD_OUT = SUITES["paper"]["holdout"]
VOCABULARY = 4096
MODEL = ModelConfig(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=2048,
)  # fmt: skip
DOCUMENTS = 32  # of an optimizer step of pretraining
STEPS, KILL_AFTER = 20, 10
SETTINGS = [
    f"steps={STEPS}", "batch.prompts=16", "batch.group_size=4", "rollout.max_new_tokens=64", "rollout.max_prompt_tokens=512",
    "task.name=files", "task.eval_problems=100", "evaluation.count=3", "evaluation.samples=2", "optimizer.lr=1e-4",
    "checkpoint_every=4",
]  # fmt: skip
SAME = (records.STEPS_FILE, records.EVALS_FILE, records.ORDER_FILE, "checkpoint/model.safetensors")
PHASES = {"prefill", "decode", "reward", "reference", "forward", "backward", "optimizer", "evaluation", "checkpoint"}
console = Console()


def document(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(f"{problem.prompt} \\boxed{{{problem.answer}}}"), tokenizer.eos_id]


def pack(documents: Sequence[Sequence[int]]) -> DocumentBatch:
    lengths = torch.tensor([0, *(len(d) - 1 for d in documents)], dtype=torch.int32)
    inputs, targets = (torch.tensor([t for d in documents for t in d[cut]]) for cut in (slice(-1), slice(1, None)))
    return DocumentBatch(inputs, lengths.cumsum(0, dtype=torch.int32), targets, torch.ones(len(targets)))


def pretrained(data: Path, out: Path, tokens: int) -> tuple[Path, dict]:
    """The folder of the model, made unless it is there, and how its making went."""
    folder, notes = out / "model", out / "pretraining.json"
    if notes.exists():
        return folder, jsonl.read_object(notes)
    for path in (folder, out / "tokenizer"):
        shutil.rmtree(path, ignore_errors=True)
    problems, held_out = read_problems(data / TRAIN), read_problems(data / HELD_OUT)
    start = time.perf_counter()
    train_bpe((p.prompt for p in problems), vocab_size=VOCABULARY, folder=out / "tokenizer")
    tokenizer_seconds = time.perf_counter() - start
    tokenizer = load_tokenizer(out / "tokenizer")
    random.Random(0).shuffle(problems)

    def batches() -> Iterator[DocumentBatch]:
        while True:
            for first in range(0, len(problems), DOCUMENTS):
                yield pack([document(p, tokenizer) for p in problems[first : first + DOCUMENTS]])

    unseen = pack([document(p, tokenizer) for p in held_out[:100]])
    model = Model(MODEL).init_weights(0, std=None)
    with torch.no_grad():
        before = float(language_loss(model, unseen))
    start = time.perf_counter()
    with Progress(console=console) as bar:
        task = bar.add_task("pretraining", total=tokens)
        last = train_language(
            model, Schedule(tokens=tokens, lr=1e-3), batches=batches(), betas=(0.9, 0.98),
            progress=lambda done, _, loss: bar.update(task, completed=done, description=f"pretraining, loss {loss:.2f}"),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    with torch.no_grad():
        after = float(language_loss(model, unseen))
    weights.save_checkpoint(model, folder, tokenizer_folder=out / "tokenizer")
    found = {
        "parameters": model.num_parameters, "tokenizer_seconds": tokenizer_seconds, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "loss_last_batch": last, "loss_unseen_before": before,
        "loss_unseen_after": after,
    }  # fmt: skip
    files.write_bytes_atomic(notes, (json.dumps(found, indent=1) + "\n").encode())
    return folder, found


def run(data: Path, folder: Path, out: Path, threads: int) -> subprocess.Popen:
    return subprocess.Popen([
        sys.executable, "-m", "grpo_engine", "train", "--out", str(out), "--threads", str(threads),
        f"model.path={json.dumps(str(folder))}", f"task.train={json.dumps(str(data / TRAIN))}",
        f"task.evals={json.dumps({'held_out': str(data / HELD_OUT)})}", *SETTINGS,
    ])  # fmt: skip


def finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"grpo-engine train ended with code {process.returncode}")


def killed_once(data: Path, folder: Path, out: Path, threads: int) -> int:
    """Runs to the end with one SIGKILL on the way; says after how many steps."""
    path, note = out / records.STEPS_FILE, out.with_name("killed.json")
    if not note.exists():
        shutil.rmtree(out, ignore_errors=True)
        process = run(data, folder, out, threads)
        while not path.exists() or path.read_bytes().count(b"\n") < KILL_AFTER:
            if process.poll() is not None:
                raise SystemExit(f"grpo-engine train ended before it could be killed, with code {process.returncode}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        note.write_text(json.dumps({"after": path.read_bytes().count(b"\n")}), encoding="utf-8")
    finish(run(data, folder, out, threads))
    return jsonl.read_object(note)["after"]


def faults(whole: Path, killed: Path) -> list[str]:
    """What is wrong with the two runs."""
    found = [f"{name} differs" for name in SAME if (whole / name).read_bytes() != (killed / name).read_bytes()]
    for out in (whole, killed):
        done = records.read_run(out)
        if [s.step for s in done.steps] != list(range(1, STEPS + 1)):
            found.append(f"{out}: a step is missing")
        if any(s.logprob_mismatch_max != 0.0 for s in done.steps):
            found.append(f"{out}: sampling and training disagree")
        if not {e.step for e in done.evals} >= {0, STEPS}:
            found.append(f"{out}: no evaluation before or after")
        if missing := PHASES - total_cost(done.timings).keys():
            found.append(f"{out}: not timed: {', '.join(sorted(missing))}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pretraining-tokens", type=int, default=400_000, help="of 1.6 million that the problems have")
    arguments = parser.parse_args()
    data, out = arguments.folder.resolve(), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    folder, pretraining = pretrained(data, out, arguments.pretraining_tokens)
    after = killed_once(data, folder, out / "killed", arguments.threads)
    finish(run(data, folder, out / "whole", arguments.threads))
    wrong = faults(out / "whole", out / "killed")

    done = records.read_run(out / "whole")
    cost = total_cost(done.timings)
    report = {
        "pretraining": pretraining,
        "phases": {name: dataclasses.asdict(c) for name, c in cost.items()},
        "rewards": [s.reward_mean for s in done.steps],
        "evals": [[e.step, e.mode, e.pass1, e.stderr] for e in done.evals],
        "left_out_too_long": done.header["task"],
        "killed_after_step": after,
        "faults": wrong,
        "seconds": time.perf_counter() - start,
    }
    files.write_bytes_atomic(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    table = Table(*COST_HEAD, "tokens/s")
    for row, c in zip(cost_rows(cost), [*cost.values(), None], strict=True):
        table.add_row(*row, f"{c.tokens / c.seconds:,.0f}" if c and c.tokens and c.seconds else "")
    console.print(table)
    console.print({name: report[name] for name in ("pretraining", "rewards", "evals", "left_out_too_long")})
    console.print(f"killed after step {after}; {'; '.join(wrong) or 'both runs complete, records and weights the same'}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
