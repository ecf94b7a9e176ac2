"""A run from its first step to its last: resumable at any moment, and the same bits either way.

A killed run loses what came after its last checkpoint. Started again, it cuts its record files back to the lengths
that the checkpoint noted and repeats those steps. Every sample depends on (seed, step, index) and on what the checkpoint
holds, so the records and the weights come out as if nothing had happened.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from grpo_engine.config import RunConfig
from grpo_engine.evaluate.evaluate import eval_steps, evaluate
from grpo_engine.load import Policy, load_policy, load_task, model_files
from grpo_engine.micro.control import control_corpus
from grpo_engine.records import records
from grpo_engine.records.cost import total_cost
from grpo_engine.records.ledger import Ledger
from grpo_engine.rewards.pool import RewardPool, reward_pool
from grpo_engine.rollout.engine import Engine
from grpo_engine.run.counters import Counters, Odometer
from grpo_engine.run.folder import RecordFiles, RunFolder
from grpo_engine.run.grpo import GrpoStepper
from grpo_engine.run.pretrain import PretrainStepper
from grpo_engine.run.progress import RunProgress
from grpo_engine.run.prompts import FittingTask, leave_out_long_prompts
from grpo_engine.system import machine
from grpo_engine.system.memory import keep_freed_memory
from grpo_engine.tasks.order import problems_from
from grpo_engine.train import advantages, loss
from grpo_engine.train.optimizer import adamw
from grpo_engine.train.step import learning_rate
from grpo_engine.types import Problem


class Stepper(Protocol):
    """One step of a method."""

    def step(self, step: int) -> records.StepRecord:
        """Does a step; 1 is the first."""


def train(config: RunConfig, out: Path | str, *, quiet: bool | None = None, wait_s: float = 0.0) -> Path:
    """Runs, or resumes, or finds finished, the run of a configuration.

    Args:
        config: what to compute.
        out: run directory; made when absent. One process writes to it at a time.
        quiet: no progress bar; None: quiet when standard error is no terminal.
        wait_s: seconds to wait for another process that writes to the directory.

    Returns:
        The run directory, complete: `summary.json` is there.

    Raises:
        ValueError: the directory holds another run (the differing setting is named), or one that was begun on a device
            that is not there, or on data that has changed, or bad input.
        RuntimeError: the run diverged, or rollout and trainer disagreed; `Locked`: another process writes to it.
    """
    folder = RunFolder.of(config, Path(out))
    if not folder.finished:
        with folder.held(wait_s=wait_s):
            folder = RunFolder.of(config, Path(out))  # another process may have gone on with it until now
            if not folder.finished:
                with RunProgress(folder.config, quiet=quiet) as progress:
                    _complete(folder, progress)
    return folder.path


def _complete(folder: RunFolder, progress: RunProgress) -> None:
    """Loads what the configuration names, goes back to the last checkpoint, and runs to the end."""
    c, began = folder.config, time.perf_counter()
    keep_freed_memory()
    advantages.estimator(c.advantage), loss.objective(c.loss)  # of the user's own: found now, or named
    source = model_files(c.model, revision=folder.revision)
    # problems first: a wrong file is found before a model of the ladder is pretrained
    whole = load_task(c.task, seed=c.seed, needed=c.most_prompts, reward=c.reward)
    policy = load_policy(c, source, whole)
    engine = Engine(policy.model, keep=policy.pages_stay)
    needs_reference = c.method == "grpo" and c.loss.kl_coef > 0
    reference = copy.deepcopy(policy.model).requires_grad_(False) if needs_reference else None
    optimizer = adamw(
        policy.model.parameters(),
        lr=learning_rate(c.optimizer, 1),
        betas=c.optimizer.betas,
        eps=c.optimizer.eps,
        weight_decay=c.optimizer.weight_decay,
    )
    fitting = leave_out_long_prompts(whole, policy.encode, c.rollout.max_prompt_tokens)
    if c.rollout.max_prompt_tokens is not None:
        progress.say(fitting.notice(c.rollout.max_prompt_tokens))
    task = fitting.task
    corpus = control_corpus(c) if c.method == "pretrain" else None

    state = folder.checkpoint()
    if state is not None:
        state.restore(policy.model, optimizer)
    counters = Counters(**state.meta["counters"]) if state is not None else Counters()

    def problems() -> Iterator[Problem]:
        """To train on, from here on."""
        return problems_from(task.train, start=counters.prompts_seen, seed=c.seed, shuffle=c.task.shuffle)

    if state is None:
        if c.method == "grpo":
            progress.announce(policy.encode.show(next(problems()), most=100))
        folder.begin(_header(c, policy, fitting))
    ledger = Ledger(counters.flops, device=c.device)
    position = Odometer(counters, ledger, unique=len(task.train), params=policy.model.num_non_embedding)

    def evaluation(pool: RewardPool) -> Callable[[bool], list[records.EvalRecord]]:
        """Answers the sets of the task, all of them or the first alone."""

        def answer(every: bool) -> list[records.EvalRecord]:
            sets = list(task.evals.values())[: None if every else 1]
            progress.start_evaluation(sets)
            results = evaluate(
                engine,
                sets,
                tokenizer=policy.tokenizer,
                encode=policy.encode,
                pool=pool,
                evaluation=c.evaluation,
                rollout=c.rollout,
                seed=c.seed,
                ledger=ledger,
                progress=progress.rollout,
            )
            progress.finish_evaluation(results)
            return [records.EvalRecord(**position.fields(), **dataclasses.asdict(r)) for r in results]

        return answer

    with reward_pool(c.reward) as pool, RecordFiles(folder, None if state is None else state.lengths) as files:
        stepper: Stepper
        if corpus is not None:
            stepper = PretrainStepper(
                config=c, model=policy.model, optimizer=optimizer, corpus=corpus, position=position
            )  # fmt: skip
        else:
            stepper = GrpoStepper(
                config=c, engine=engine, reference=reference, optimizer=optimizer, problems=problems,
                note_order=files.order.write_lines, tokenizer=policy.tokenizer, encode=policy.encode, pool=pool,
                position=position, progress=progress.rollout,
            )  # fmt: skip
        save = lambda: files.checkpoint(counters, policy.model, optimizer, policy.tokenizer.folder)  # noqa: E731
        _loop(c, stepper, evaluation(pool), position, files, save, progress, began=began)
        progress.finish_run(total_cost(files.read_timings()))
    folder.finish(counters)


def _loop(
    c: RunConfig,
    stepper: Stepper,
    evaluation: Callable[[bool], list[records.EvalRecord]],
    position: Odometer,
    files: RecordFiles,
    save: Callable[[], None],
    progress: RunProgress,
    *,
    began: float,
) -> None:
    """The steps that are left: each is recorded, evaluated where that is due, timed and now and then kept."""
    due = eval_steps(c)
    clock, ledger = began, position.ledger

    def write_evaluation(step: int) -> None:
        every = due.index(step) % c.evaluation.others_every == 0 or step == due[-1]
        for record in evaluation(every):
            files.evals.write(record)

    def write_timing(step: int) -> None:
        nonlocal clock
        before, clock = clock, time.perf_counter()
        files.timings.write(records.TimingRecord(step=step, phase=ledger.close_step(), seconds=clock - before))

    if position.counters.step == 0 and 0 in due:
        write_evaluation(0)
    for step in range(position.counters.step + 1, c.steps + 1):
        progress.start_step(step)
        record = stepper.step(step)
        files.steps.write(record)
        progress.finish_step(record)
        if step in due:
            write_evaluation(step)
        write_timing(step)
        if step % c.checkpoint_every == 0 or step == c.steps:
            with ledger.timed("checkpoint"):
                save()
    write_timing(c.steps)


def _header(c: RunConfig, policy: Policy, fitting: FittingTask) -> dict[str, Any]:
    """What run.json says beside the identity of the run."""
    return {
        "model": {
            "name": c.model.path or f"{c.model.size}-{c.model.kind}",
            "kind": c.model.kind,
            "size": c.model.size if c.model.path is None else Path(c.model.path).name,
            "revision": policy.revision,
            "params_non_embedding": policy.model.num_non_embedding,
            "params_nominal": c.model.params_nominal,
            "params_total": policy.model.num_parameters,
        },
        "task": {
            "train_problems": len(fitting.task.train),
            "left_out_too_long": fitting.too_long,
            "evals_left_out_too_long": fitting.evals_too_long,
        },
        "source": machine.collect_source(),
        "versions": machine.collect_versions(),
        "hardware": machine.collect_hardware(),
    }
