"""A run from its first step to its last: resumable at any moment, and the same bits either way.

A killed run loses what came after its last checkpoint. Started again, it cuts its record files back to the lengths
that the checkpoint noted and repeats those steps; every draw depends on (seed, step, place) and not on history, so
the records and the weights come out as if nothing had happened.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from grpo_engine import advantages, checkpoint, device, footprint, hub, loss, plugins, pretrain, records, weights
from grpo_engine.config import RewardConfig, RunConfig, TaskConfig
from grpo_engine.cost import total_cost
from grpo_engine.evaluate import EvalResult, eval_steps, evaluate
from grpo_engine.ledger import Ledger
from grpo_engine.memory import keep_freed_memory
from grpo_engine.model import Model
from grpo_engine.optimizer import adamw
from grpo_engine.progress import RunProgress
from grpo_engine.rewards.pool import reward_pool
from grpo_engine.rollout import Engine
from grpo_engine.step import StepOutcome, grpo_step, learning_rate
from grpo_engine.tasks.subset import difficulty, subset
from grpo_engine.tokenizer import PromptTokens, Tokenizer, load_tokenizer
from grpo_engine.types import Problem, Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(kw_only=True, slots=True)
class Counters:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
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
    return Run(config, Path(out), quiet=quiet).complete()


def evaluate_only(config: RunConfig) -> list[EvalResult]:
    """Answers every evaluation set of a configuration with the model as it is.

    Args:
        config: model, task, evaluation, rollout limits and seed are read.

    Returns:
        One result for each set and mode.

    Raises:
        ValueError: no evaluation set, or bad input.
    """
    config = config.model_copy(update={"device": device.resolve(config.device)})
    folder = hub.find_model(config.model.path).folder if config.model.path else None
    task = load_task(config.task, seed=config.seed, needed=1, reward=config.reward)
    if not task.evals:
        raise ValueError("evaluate: task.evals names no evaluation set")
    tokenizer, encode, model, _ = tokenizer_and_model(config, folder)
    with reward_pool(config.reward) as pool:
        return evaluate(
            Engine(model), list(task.evals.values()), tokenizer=tokenizer, encode=encode, pool=pool,
            evaluation=config.evaluation, rollout=config.rollout, seed=config.seed,
        )  # fmt: skip


def tokenizer_and_model(
    config: RunConfig, folder: Path | None, train_on: Task | None = None
) -> tuple[Tokenizer, PromptTokens, Model, bool]:
    """What a run starts from.

    Args:
        config: model and task are read; its device is resolved.
        folder: of the weights; None: a model of the embedded ladder.
        train_on: what the model is to be trained on, for which there must be room; None: it only answers.

    Returns:
        The tokenizer, prompts in its tokens, the model on the device, and whether pages may stay beside training.

    Raises:
        ValueError: more tokens than the model has, a prompt without room for an answer, a bad folder, or no room.
    """
    if config.device == "cuda":
        device.require_capability()
    m = config.model
    folder = folder or pretrain.ensure_model(m.size, m.kind, seed=m.seed)
    tokenizer = load_tokenizer("micro" if config.task.name == "micro" or m.size else folder)
    encode = PromptTokens(tokenizer, chat=m.kind == "instruct")
    pages_stay = True
    if train_on is not None:
        sizes, longest = weights.read_config(folder), _longest(train_on, encode, config.rollout.max_prompt_tokens)
        _require_positions(sizes.max_position_embeddings, longest, config)
        pages_stay = footprint.require_room(config, sizes, longest)
    model = weights.load_model(
        folder, dtype=DTYPES[m.dtype], device=config.device, batch_invariant=m.batch_invariant
    )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {model.config.vocab_size}: {folder}"
        )
    return tokenizer, encode, model, pages_stay


def _require_positions(positions: int, longest: int, config: RunConfig) -> None:
    """Refuses a prompt that would end the run at the step that draws it."""
    answer = config.rollout.max_new_tokens
    if longest + answer > positions:
        mend = f"; rollout.max_prompt_tokens={positions - answer} leaves the longer ones out" if answer < positions else ""
        raise ValueError(
            f"prompts of up to {longest} tokens with rollout.max_new_tokens={answer} exceed the model's {positions} "
            f"positions{mend}"
        )


def _longest(task: Task, encode: PromptTokens, limit: int | None) -> int:
    """Tokens of the longest prompt, of those that are not left out."""
    problems = [*task.train, *(p for s in task.evals.values() for p in s.problems)]
    # only the longest texts are read: a text of half their length has hardly more tokens
    longest = sorted(problems, key=lambda p: len(p.prompt))[-64:]
    tokens = max(len(encode(p)) for p in longest)
    return min(tokens, limit or tokens)


class Run:
    """The state of one run: model, optimizer, counters and open record files."""

    def __init__(self, config: RunConfig, out: Path, *, quiet: bool | None) -> None:
        self.out = out
        self.quiet = quiet
        self.finished = (out / records.SUMMARY_FILE).exists()
        begun = records.read_json(out / records.RUN_FILE) if (out / records.RUN_FILE).exists() else None
        # a device decides the last bits, so it is part of what a run is: the id is that of the resolved configuration
        self.config = config.model_copy(update={"device": self._device(config.device, begun)})
        self.run_id = records.run_id(self.config.model_dump(mode="json"))
        self.revision = begun and begun["model"].get("revision")  # a run goes on with the weights that it began with
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
            folder, self.revision = dataclasses.astuple(hub.find_model(c.model.path, revision=self.revision))
        # problems first: a wrong file is found before a model of the ladder is pretrained
        self.task = load_task(
            c.task, seed=c.seed, needed=c.steps * c.batch.prompts, reward=c.reward
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
        self.corpus = pretrain.control_corpus(c) if c.method == "pretrain" else None

        self.counters = Counters()
        lengths = {name: 0 for name in (records.STEPS_FILE, records.EVALS_FILE, records.TIMINGS_FILE)}
        state = checkpoint.load(self.out, config_hash=self.run_id)
        if state is not None:
            self.counters = Counters(**state.meta["counters"])
            lengths = state.lengths
            state.restore(self.model, self.optimizer)
        else:
            if c.method == "grpo":
                seen = (p.uid for step in range(1, c.steps + 1) for p in self._problems(step))
                records.write_bytes_atomic(self.out / records.ORDER_FILE, "".join(f"{u}\n" for u in seen).encode())
            records.write_json_atomic(self.out / records.RUN_FILE, self._header())
        self.steps, self.evals, self.timings = (
            records.JsonlWriter(self.out / name, truncate_to=length) for name, length in lengths.items()
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
                "size": c.model.size or Path(c.model.path).name,
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
            "source": records.collect_source(),
            "versions": records.collect_versions(),
            "hardware": records.collect_hardware(),
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
        for writer in (self.steps, self.evals, self.timings):
            writer.close()
        found = records.read_jsonl(self.out / records.TIMINGS_FILE).records
        timings = [records.from_json(records.TimingRecord, o) for o in found]
        self.progress.finish_run(total_cost(timings))
        records.write_json_atomic(
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
        self.timings.write(
            records.TimingRecord(step=step, phase=self.ledger.close_step(), seconds=self.clock - before)
        )

    def _checkpoint(self) -> None:
        for writer in (self.steps, self.evals, self.timings):
            writer.sync()
        checkpoint.save(
            self.out,
            model=self.model,
            optimizer=self.optimizer,
            step=self.counters.step,
            config_hash=self.run_id,
            lengths={w.path.name: w.num_bytes for w in (self.steps, self.evals, self.timings)},
            meta={"counters": dataclasses.asdict(self.counters)},
            tokenizer_folder=self.tokenizer.folder,
        )

    def _grpo_step(self, step: int) -> records.StepRecord:
        P = self.config.batch.prompts
        outcome = grpo_step(
            self.engine,
            self.reference,
            self.optimizer,
            self._problems(step),
            tokenizer=self.tokenizer,
            encode=self.encode,
            pool=self.pool,
            config=self.config,
            step=step,
            ledger=self.ledger,
            progress=self.progress.rollout,
        )
        self._count(step, outcome.trained_tokens)
        return self._record(step, **_step_fields(outcome, prompts=P, has_reference=self.reference is not None))

    def _problems(self, step: int) -> list[Problem]:
        c = self.config
        return problems_of_step(
            self.task.train, step=step, count=c.batch.prompts, seed=c.seed, shuffle=c.task.shuffle
        )

    def _pretrain_step(self, step: int) -> records.StepRecord:
        outcome = pretrain.control_step(
            self.model, self.optimizer, self.corpus, config=self.config, step=step, ledger=self.ledger
        )
        self._count(step, outcome.trained_tokens)
        return self._record(step, loss=outcome.loss, grad_norm=outcome.grad_norm)

    def _count(self, step: int, tokens: int) -> None:
        self.counters.step = step
        self.counters.trained_tokens += tokens
        self.counters.flops = self.ledger.flops_without_evaluation

    def _so_far(self, step: int) -> dict[str, float]:
        seen = step * self.config.batch.prompts if self.config.method == "grpo" else 0
        return {
            "step": step,
            "prompts_seen": seen,
            "unique_prompts": min(seen, len(self.task.train)),
            "trained_tokens": self.counters.trained_tokens,
            "compute_6nt": 6.0 * self.model.num_non_embedding * self.counters.trained_tokens,
            "compute_ledger": self.counters.flops,
        }

    def _record(self, step: int, **fields) -> records.StepRecord:
        return records.StepRecord(**self._so_far(step), lr=self.optimizer.param_groups[0]["lr"], **fields)

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


def _step_fields(outcome: StepOutcome, *, prompts: int, has_reference: bool) -> dict:
    rollout, stats = outcome.rollout, outcome.stats
    rewards = torch.tensor([r.value for r in outcome.rewards], dtype=torch.float64, device="cpu")
    lengths = (rollout.cu_seqlens[1:] - rollout.cu_seqlens[:-1]).long()
    response_tokens = int((lengths - rollout.prompt_len).sum())
    return {
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(correction=1).item(),
        "reward_failures": sum(r.status != "ok" for r in outcome.rewards),
        "groups": prompts,
        "equal_groups": outcome.equal_groups,
        "response_len_mean": response_tokens / rollout.num_sequences,
        "finished_share": rollout.finish.count("stop") / rollout.num_sequences,
        "prompt_tokens": int(rollout.prompt_len.sum()),
        "response_tokens": response_tokens,
        "loss": outcome.loss,
        "kl": stats.kl / stats.tokens if has_reference else None,
        "entropy": rollout.entropy.double().sum().item() / response_tokens,
        "clip_low_share": stats.clip_low / stats.tokens,
        "clip_high_share": stats.clip_high / stats.tokens,
        "ratio_max": stats.ratio_max,
        "grad_norm": outcome.grad_norm,
        "logprob_mismatch_max": outcome.mismatch_max,
    }


def load_task(config: TaskConfig, *, seed: int, needed: int, reward: RewardConfig | None = None) -> Task:
    """The problems of a run.

    Args:
        config: which.
        seed: of the run; generated training problems depend on it, test problems do not.
        needed: training problems that the run draws; a generator makes that many, or config.train_problems if that
            is more.
        reward: whose behaviour the scorers of files have, and whose function, if it names one, scores all problems;
            None: the defaults.

    Returns:
        A `Task` with config.train_problems training problems (see `subset`), where there are as many, from easy to hard
        unless they are to be shuffled, and at most config.eval_problems problems in each evaluation set.

    Raises:
        ValueError: a bad file, or a function of the user's that is not there or returns no task; the fault is named.
    """
    reward = reward or RewardConfig()
    if plugins.is_target(config.name):
        task = _own_task(config, seed=seed, needed=needed)
    elif config.name == "files":
        from grpo_engine.tasks.files import files_task

        task = files_task(
            train=config.train, evals=config.evals, eval_problems=config.eval_problems, behaviour=reward.behaviour
        )
    else:
        from grpo_engine.tasks.micro import micro_task

        count = max(needed, config.train_problems or 0)
        task = micro_task(
            train_problems=count, eval_problems=config.eval_problems, seed=seed, selection=config.eval_draw == "selection"
        )
    train = task.train
    if config.train_problems is not None:
        train = subset(train, config.train_problems, seed=seed, how=config.subset)
    task = dataclasses.replace(task, train=train if config.shuffle else sorted(train, key=difficulty))
    return _scored_by(task, reward.function)


def _own_task(config: TaskConfig, *, seed: int, needed: int) -> Task:
    task = plugins.load(config.name, "task.name")(config, seed=seed, needed=needed)
    if not isinstance(task, Task) or not task.train:
        raise ValueError(f"task.name={config.name}: must return a grpo_engine.types.Task with problems, got {task!r:.200}")
    uids = [p.uid for problems in (task.train, *(s.problems for s in task.evals.values())) for p in problems]
    if len(set(uids)) < len(uids):
        twice = collections.Counter(uids).most_common(1)[0][0]
        raise ValueError(f"task.name={config.name}: no two problems, trained on or not, may share a uid: {twice!r}")
    return task


def _scored_by(task: Task, function: str | None) -> Task:
    """The task with one scorer for all, if one is given; a scorer that is not there is found now and not in a worker."""

    def changed(problems: Sequence[Problem]) -> list[Problem]:
        return [dataclasses.replace(p, reward=function) for p in problems]

    if function is not None:
        evals = {name: dataclasses.replace(s, problems=changed(s.problems)) for name, s in task.evals.items()}
        task = dataclasses.replace(task, train=changed(task.train), evals=evals)
    for name in {p.reward for problems in (task.train, *(s.problems for s in task.evals.values())) for p in problems}:
        if plugins.is_target(name):
            plugins.load(name, "Problem.reward" if function is None else "reward.function")
    return task


def problems_of_step(
    problems: Sequence[Problem], *, step: int, count: int, seed: int, shuffle: bool
) -> list[Problem]:
    """The prompts of one step: the set in order, again and again, each pass in an order of its own.

    Args:
        problems: U of them.
        step: 1 is the first.
        count: P.
        seed: of the run.
        shuffle: False keeps the given order in every pass.

    Returns:
        P problems; a pass that ends within the step is followed by the start of the next.
    """
    U = len(problems)
    chosen = []
    orders: dict[int, Tensor] = {}
    for place in range((step - 1) * count, step * count):
        epoch, i = divmod(place, U)
        if shuffle:
            if epoch not in orders:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                orders[epoch] = torch.randperm(U, generator=generator, device="cpu")
            i = int(orders[epoch][i])
        chosen.append(problems[i])
    return chosen


def _differences(a: dict, b: dict, prefix: str = "") -> list[str]:
    names = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            names += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            names.append(f"{prefix}{key} ({x!r} there, {y!r} here)")
    return names
