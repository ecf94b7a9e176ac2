"""A run from its first step to its last: resumable at any moment, and the same bits either way.

A killed run loses what came after its last checkpoint. Started again, it cuts its record files back to the lengths
that the checkpoint noted and repeats those steps. Every sample depends on (seed, step, index) and on what the checkpoint
holds, so the records and the weights come out as if nothing had happened.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from grpo_engine.config import RunConfig
from grpo_engine.evaluate.evaluate import eval_steps, evaluate
from grpo_engine.load import load_task, tokenizer_and_model
from grpo_engine.micro import control
from grpo_engine.model import hub
from grpo_engine.records import jsonl, records
from grpo_engine.records.cost import total_cost
from grpo_engine.records.ledger import Ledger
from grpo_engine.rewards.pool import reward_pool
from grpo_engine.rollout.engine import Engine
from grpo_engine.run.progress import RunProgress
from grpo_engine.system import device, machine
from grpo_engine.system.memory import keep_freed_memory
from grpo_engine.tasks.order import problems_from
from grpo_engine.train import advantages, checkpoint, loss
from grpo_engine.train.optimizer import adamw
from grpo_engine.train.step import StepOutcome, grpo_step, learning_rate
from grpo_engine.types import Problem, Task


@dataclasses.dataclass(kw_only=True, slots=True)
class Counters:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    prompts_seen: int = 0
    trained_tokens: int = 0
    flops: float = 0.0  # the ledger's, evaluation left out


def train(config: RunConfig, out: Path | str, *, quiet: bool | None = None) -> Path:
    """Runs, or resumes, or finds finished, the run of a configuration.

    Args:
        config: what to compute.
        out: run directory; made when absent. One run writes to it at a time.
        quiet: no progress bar; None: quiet when standard error is no terminal.

    Returns:
        The run directory, complete: `summary.json` is there.

    Raises:
        ValueError: the directory holds another run (the differing setting is named), or one that was begun on a device
            that is not there, or bad input.
        RuntimeError: the run diverged, or rollout and trainer disagreed.
    """
    return TrainingRun(config, Path(out), quiet=quiet).complete()


class TrainingRun:
    """The state of one run: model, optimizer, counters and open record files."""

    def __init__(self, config: RunConfig, out: Path, *, quiet: bool | None) -> None:
        self.out = out
        self.quiet = quiet
        self.finished = (out / records.SUMMARY_FILE).exists()
        begun = jsonl.read_json(out / records.RUN_FILE) if (out / records.RUN_FILE).exists() else None
        # a device decides the last bits, so it is part of what a run is: the id is that of the resolved configuration
        self.config = config.model_copy(update={"device": self._device(config.device, begun)})
        self.run_id = records.run_id(self.config.model_dump(mode="json"))
        # a run goes on with the weights that it began with
        self.revision: str | None = begun["model"].get("revision") if begun else None
        if begun is not None:
            self._refuse_another_run(begun)
        out.mkdir(parents=True, exist_ok=True)

    def complete(self) -> Path:
        """See `train`."""
        if self.finished:
            return self.out
        self.clock = time.perf_counter()
        with RunProgress(self.config, quiet=self.quiet) as progress:
            self.progress = progress
            self._load()
            with reward_pool(self.config.reward) as self.pool:
                self._loop()
        return self.out

    # ------------------------------------------------------------------ setting up

    def _device(self, asked: str, begun: dict | None) -> str:
        """Where to compute: a run stays where it was begun, unless the configuration says otherwise (and is refused)."""
        if begun is None:
            return device.resolve(asked)
        before = begun["config"].get("device", "cpu")
        if asked not in ("auto", before):
            return asked
        if self.finished:
            return before
        try:
            return device.resolve(before)
        except ValueError as e:
            raise ValueError(
                f"{self.out} was begun on {before}, and another device would change its bits: go on where there is one, "
                f"or begin anew in another folder ({e})"
            ) from None

    def _refuse_another_run(self, begun: dict) -> None:
        if begun["run_id"] != self.run_id:
            differing = _differences(begun["config"], self.config.model_dump(mode="json"))
            raise ValueError(f"{self.out} holds another run ({begun['run_id']}); it differs in {', '.join(differing)}")

    def _load(self) -> None:
        c = self.config
        keep_freed_memory()
        advantages.estimator(c.advantage), loss.objective(c.loss)  # of the user's own: found now, or named
        folder = None
        if c.model.path is not None:
            found = hub.find_model(c.model.path, revision=self.revision)
            folder, self.revision = found.folder, found.revision
        # problems first: a wrong file is found before a model of the ladder is pretrained
        self.task = load_task(
            c.task, seed=c.seed, needed=c.steps * c.batch.prompts * c.batch.sampling_rounds, reward=c.reward
        )
        self.tokenizer, self.encode, self.model, pages_stay = tokenizer_and_model(c, folder, self.task)
        self.engine = Engine(self.model, keep=pages_stay)
        needs_reference = c.method == "grpo" and c.loss.kl_coef > 0
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if needs_reference else None
        self.optimizer = adamw(
            self.model.parameters(),
            lr=learning_rate(c.optimizer, 1),
            betas=c.optimizer.betas,
            eps=c.optimizer.eps,
            weight_decay=c.optimizer.weight_decay,
        )
        self._leave_out_long_prompts()
        self.corpus = control.control_corpus(c) if c.method == "pretrain" else None

        self.counters = Counters()
        lengths = {name: 0 for name in (records.STEPS_FILE, records.EVALS_FILE, records.TIMINGS_FILE, records.ORDER_FILE)}
        state = checkpoint.load(self.out, config_hash=self.run_id)
        if state is not None:
            self.counters = Counters(**state.meta["counters"])
            lengths = state.lengths
            state.restore(self.model, self.optimizer)
        else:
            if c.method == "grpo":
                self.progress.announce(self.encode.show(next(self._problems()), most=100))
            jsonl.write_json_atomic(self.out / records.RUN_FILE, self._header())
        self.steps, self.evals, self.timings, self.order = self.writers = tuple(
            jsonl.JsonlWriter(self.out / name, truncate_to=length) for name, length in lengths.items()
        )
        self.ledger = Ledger(self.counters.flops, device=c.device)

    def _leave_out_long_prompts(self) -> None:
        """Keeps what fits into rollout.max_prompt_tokens, in training and in evaluation, and counts the rest."""
        whole, limit = self.task, self.config.rollout.max_prompt_tokens

        def fitting(what: str, problems: Sequence[Problem]) -> Sequence[Problem]:
            if limit is None:
                return problems
            kept = [p for p in problems if len(self.encode(p)) <= limit]
            if not kept:
                raise ValueError(f"rollout.max_prompt_tokens={limit} leaves no problem {what}")
            return kept

        self.task = Task(
            name=whole.name,
            train=fitting("to train on", whole.train),
            evals={
                name: dataclasses.replace(s, problems=fitting(f"of {name}", s.problems)) for name, s in whole.evals.items()
            },
        )
        self.num_too_long = len(whole.train) - len(self.task.train)
        self.evals_too_long = {
            name: len(s.problems) - len(self.task.evals[name].problems) for name, s in whole.evals.items()
        }
        if limit is not None:
            self.progress.say(
                f"longer than {limit} tokens and left out: {self.num_too_long} of {len(whole.train)} training prompts"
                + "".join(f", {n} of {name}" for name, n in self.evals_too_long.items() if n)
            )

    def _header(self) -> dict:
        c = self.config
        return {
            "run_id": self.run_id,
            "method": c.method,
            "config": c.model_dump(mode="json"),
            "model": {
                "name": c.model.path or f"{c.model.size}-{c.model.kind}",
                "kind": c.model.kind,
                "size": c.model.size or Path(c.model.path or "").name,
                "revision": self.revision,
                "params_non_embedding": self.model.num_non_embedding,
                "params_nominal": c.model.params_nominal,
                "params_total": self.model.num_parameters,
            },
            "task": {
                "train_problems": len(self.task.train),
                "left_out_too_long": self.num_too_long,
                "evals_left_out_too_long": self.evals_too_long,
            },
            "source": machine.collect_source(),
            "versions": machine.collect_versions(),
            "hardware": machine.collect_hardware(),
        }

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        c, due = self.config, eval_steps(self.config)
        if self.counters.step == 0 and 0 in due:
            self._evaluate(0, due)
        for step in range(self.counters.step + 1, c.steps + 1):
            self.progress.start_step(step)
            record = self._grpo_step(step) if c.method == "grpo" else self._pretrain_step(step)
            self.steps.write(record)
            self.progress.finish_step(record)
            if step in due:
                self._evaluate(step, due)
            self._write_timing(step)
            if step % c.checkpoint_every == 0 or step == c.steps:
                with self.ledger.timed("checkpoint"):
                    self._checkpoint()
        self._write_timing(c.steps)
        for writer in self.writers:
            writer.close()
        found = jsonl.read_jsonl(self.out / records.TIMINGS_FILE).records
        timings = [jsonl.from_json(records.TimingRecord, o) for o in found]
        self.progress.finish_run(total_cost(timings))
        jsonl.write_json_atomic(
            self.out / records.SUMMARY_FILE,
            {
                "run_id": self.run_id,
                "steps": c.steps,
                "trained_tokens": self.counters.trained_tokens,
                "compute_ledger": self.counters.flops,
            },
        )

    def _write_timing(self, step: int) -> None:
        before, self.clock = self.clock, time.perf_counter()
        self.timings.write(records.TimingRecord(step=step, phase=self.ledger.close_step(), seconds=self.clock - before))

    def _checkpoint(self) -> None:
        for writer in self.writers:
            writer.sync()
        checkpoint.save(
            self.out,
            model=self.model,
            optimizer=self.optimizer,
            step=self.counters.step,
            config_hash=self.run_id,
            lengths={w.path.name: w.num_bytes for w in self.writers},
            meta={"counters": dataclasses.asdict(self.counters)},
            tokenizer_folder=self.tokenizer.folder,
        )

    def _grpo_step(self, step: int) -> records.StepRecord:
        outcome = grpo_step(
            self.engine,
            self.reference,
            self.optimizer,
            self._problems(),
            tokenizer=self.tokenizer,
            encode=self.encode,
            pool=self.pool,
            config=self.config,
            step=step,
            ledger=self.ledger,
            progress=self.progress.rollout,
        )
        groups = len(outcome.scored.rewards) // self.config.batch.group_size
        self.order.write_lines(p.uid for p in islice(self._problems(), groups))
        self.counters.prompts_seen += groups
        self._count(step, outcome.trained_tokens)
        return self._record(step, **_step_fields(outcome, self.config))

    def _problems(self) -> Iterator[Problem]:
        """The training problems from here on."""
        c = self.config
        return problems_from(self.task.train, start=self.counters.prompts_seen, seed=c.seed, shuffle=c.task.shuffle)

    def _pretrain_step(self, step: int) -> records.StepRecord:
        assert self.corpus is not None  # of a control
        outcome = control.control_step(
            self.model, self.optimizer, self.corpus, config=self.config, step=step, ledger=self.ledger
        )
        self._count(step, outcome.trained_tokens)
        return self._record(step, loss=outcome.loss, grad_norm=outcome.grad_norm)

    def _count(self, step: int, tokens: int) -> None:
        self.counters.step = step
        self.counters.trained_tokens += tokens
        self.counters.flops = self.ledger.flops_without_evaluation

    def _so_far(self, step: int) -> dict[str, float]:
        return {
            "step": step,
            "prompts_seen": self.counters.prompts_seen,
            "unique_prompts": min(self.counters.prompts_seen, len(self.task.train)),
            "trained_tokens": self.counters.trained_tokens,
            "compute_6nt": 6.0 * self.model.num_non_embedding * self.counters.trained_tokens,
            "compute_ledger": self.counters.flops,
        }

    def _record(self, step: int, **fields) -> records.StepRecord:
        return records.StepRecord(**self._so_far(step), lr=learning_rate(self.config.optimizer, step), **fields)

    def _evaluate(self, step: int, due: Sequence[int]) -> None:
        sets = list(self.task.evals.values())
        place = due.index(step)
        if place % self.config.evaluation.others_every and step != due[-1]:
            sets = sets[:1]
        self.progress.start_evaluation(sets)
        results = evaluate(
            self.engine,
            sets,
            tokenizer=self.tokenizer,
            encode=self.encode,
            pool=self.pool,
            evaluation=self.config.evaluation,
            rollout=self.config.rollout,
            seed=self.config.seed,
            ledger=self.ledger,
            progress=self.progress.rollout,
        )
        for result in results:
            self.evals.write(records.EvalRecord(**self._so_far(step), **dataclasses.asdict(result), loss=result.loss))
        self.progress.finish_evaluation(results)


def _step_fields(outcome: StepOutcome, config: RunConfig) -> dict:
    rollout, stats = outcome.scored.rollout, outcome.stats
    rewards = torch.tensor([r.value for r in outcome.scored.rewards], dtype=torch.float64, device="cpu")
    response_tokens = int(rollout.response_len.sum())
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=1).item(),
        "reward_failures": sum(r.status != "ok" for r in outcome.scored.rewards),
        "groups": rollout.num_sequences // rollout.group_size,
        "zero_variance_groups": outcome.zero_variance_groups,
        "overlong_penalty_mean": None if config.reward.overlong_buffer is None else outcome.overlong_penalty,
        "masked_responses": outcome.masked_responses if config.loss.mask_truncated else None,
        "response_len_mean": response_tokens / rollout.num_sequences,
        "finished_share": rollout.finish.count("stop") / rollout.num_sequences,
        "prompt_tokens": int(rollout.prompt_len.sum()),
        "response_tokens": response_tokens,
        "loss": outcome.loss,
        "kl": stats.kl / stats.tokens if stats and config.loss.kl_coef > 0 else None,
        "entropy": rollout.entropy.double().sum().item() / response_tokens,
        "clip_low_share": stats and stats.clip_low / stats.tokens,
        "clip_high_share": stats and stats.clip_high / stats.tokens,
        "ratio_max": stats and stats.ratio_max,
        "grad_norm": outcome.grad_norm,
        "logprob_mismatch_max": outcome.mismatch_max,
    }


def _differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            names += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            names.append(f"{prefix}{key} ({x!r} there, {y!r} here)")
    return names
