"""What a configuration names: its problems, its tokenizer, its weights."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Sequence

import torch

from grpo_engine.config import ModelSource, RewardConfig, RunConfig, TaskConfig
from grpo_engine.micro import pretrain
from grpo_engine.micro.task import micro_task
from grpo_engine.micro.tokenizer import MicroTokenizer
from grpo_engine.model import gguf, hf_config, hub, weights
from grpo_engine.model.decoder import Model
from grpo_engine.model.tokenizer import HFTokenizer, PromptTokens, Tokenizer
from grpo_engine.rewards import scorer_target
from grpo_engine.system import device, plugins
from grpo_engine.tasks.files import files_task
from grpo_engine.tasks.order import problems_from
from grpo_engine.tasks.subset import difficulty, subset
from grpo_engine.train import footprint
from grpo_engine.types import Problem, Task


def load_tokenizer(name_or_folder: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model.

    Args:
        name_or_folder: "micro" for the embedded models, else a folder in Hugging Face's format.

    Returns:
        A `Tokenizer`.

    Raises:
        FileNotFoundError, ValueError: see `HFTokenizer`.
    """
    if name_or_folder == "micro":
        return MicroTokenizer()
    return HFTokenizer(name_or_folder)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A model, ready to sample from and to train, with its tokenizer."""

    tokenizer: Tokenizer
    encode: PromptTokens  # prompts in its tokens
    model: Model  # on its device
    pages_stay: bool  # whether the rollout's pages may stay beside training
    revision: str | None  # commit of the weights on the hub


def model_files(model: ModelSource, *, revision: str | None = None) -> hub.Snapshot | None:
    """Where the weights of a configuration lie, fetched or converted if need be; None: a model of the embedded ladder.

    Args:
        model: its path is read.
        revision: the commit to take, of a run that goes on.

    Raises:
        FileNotFoundError: see `hub.find_model`.
        ValueError: a GGUF file that is not understood (see `gguf.convert`).
    """
    if model.path is None:
        return None
    return gguf.converted(model.path) if gguf.is_gguf(model.path) else hub.find_model(model.path, revision=revision)


def load_policy(config: RunConfig, source: hub.Snapshot | None, train_on: Task | None = None) -> Policy:
    """What a run starts from.

    Args:
        config: model and task are read; its device is resolved.
        source: what `model_files` found.
        train_on: what the model is to be trained on, for which there must be room; None: it only answers.

    Returns:
        A `Policy`.

    Raises:
        ValueError: more tokens than the model has, a prompt without room for an answer, a bad folder, or no room.
    """
    if config.device == "cuda":
        device.require_capability()
    m = config.model
    if source is None:
        assert m.size is not None  # ModelConfig demands a path or a size
        folder = pretrain.ensure_model(m.size, m.kind, seed=m.seed)
    else:
        folder = source.folder
    tokenizer = load_tokenizer("micro" if config.task.name == "micro" or m.size else folder)
    encode = prompt_tokens(m, tokenizer)
    pages_stay = True
    if train_on is not None:
        sizes, longest = hf_config.read_config(folder), _longest(train_on, encode, config.rollout.max_prompt_tokens)
        _require_positions(sizes.max_position_embeddings, longest, config)
        pages_stay = footprint.require_room(config, sizes, longest)
    model = weights.load_model(folder, dtype=DTYPES[m.dtype], device=config.device, batch_invariant=m.batch_invariant)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {model.config.vocab_size}: {folder}"
        )
    revision = source.revision if source else None
    return Policy(tokenizer=tokenizer, encode=encode, model=model, pages_stay=pages_stay, revision=revision)


def prompt_tokens(model: ModelSource, tokenizer: Tokenizer) -> PromptTokens:
    """Prompts in the tokens that a model is given.

    Args:
        model: its kind, system prompt and templates are read.
        tokenizer: the model's.

    Returns:
        From a problem to tokens.
    """
    return PromptTokens(
        tokenizer,
        chat=model.kind == "instruct",
        system_prompt=model.system_prompt,
        chat_template_kwargs=model.chat_template_kwargs,
        prompt_template=model.prompt_template,
    )


def first_prompt(config: RunConfig) -> str:
    """The first prompt that a run trains on, as text and tokens; no weights are read.

    Args:
        config: model, task, reward, seed, steps, batch.prompts and rollout.max_prompt_tokens are read.

    Returns:
        See `PromptTokens.show`.

    Raises:
        FileNotFoundError, ValueError: no such model, a bad file, or no prompt that fits.
    """
    m = config.model
    source = model_files(m)
    task = load_task(config.task, seed=config.seed, needed=config.most_prompts, reward=config.reward)
    encode = prompt_tokens(m, load_tokenizer("micro" if config.task.name == "micro" or source is None else source.folder))
    limit = config.rollout.max_prompt_tokens
    fitting = [p for p in task.train if limit is None or len(encode(p)) <= limit]
    if not fitting:
        raise ValueError(f"rollout.max_prompt_tokens={limit} leaves no problem to train on")
    return encode.show(next(problems_from(fitting, start=0, seed=config.seed, shuffle=config.task.shuffle)))


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


def load_task(config: TaskConfig, *, seed: int, needed: int, reward: RewardConfig | None = None) -> Task:
    """The problems of a run.

    Args:
        config: which.
        seed: of the run; generated training problems depend on it, test problems do not.
        needed: training problems that the run draws; a generator makes that many, or config.train_problems if that
            is more.
        reward: whose scoring the scorers of files have, and whose scorer or function, if it names one, scores all
            problems; None: the defaults.

    Returns:
        A `Task` with config.train_problems training problems (see `subset`), where there are as many, from easy to hard
        unless they are to be shuffled, and at most config.eval_problems problems in each evaluation set.

    Raises:
        ValueError: a bad file, a scorer that is not there, or a function of the user's that is not there or returns no
            task; the fault is named.
    """
    reward = reward or RewardConfig()
    _require_scorers(config, reward)
    if plugins.is_target(config.name):
        task = _own_task(config, seed=seed, needed=needed)
    elif config.name == "files":
        assert config.train is not None  # TaskConfig demands it
        task = files_task(
            train=config.train, evals=config.evals, eval_problems=config.eval_problems, scoring=reward.scoring,
            scorer=reward.function or reward.scorer,
        )  # fmt: skip
    else:
        count = max(needed, config.train_problems or 0)
        task = micro_task(
            train_problems=count, eval_problems=config.eval_problems, seed=seed, selection=config.eval_draw == "selection"
        )
    train = task.train
    if config.train_problems is not None:
        train = subset(train, config.train_problems, seed=seed, how=config.subset)
    task = dataclasses.replace(task, train=train if config.shuffle else sorted(train, key=difficulty))
    return _scored_by(task, reward)


def _own_task(config: TaskConfig, *, seed: int, needed: int) -> Task:
    task = plugins.load(config.name, "task.name")(config, seed=seed, needed=needed)
    if not isinstance(task, Task) or not task.train:
        raise ValueError(f"task.name={config.name}: must return a grpo_engine.types.Task with problems, got {task!r:.200}")
    uids = [p.uid for problems in (task.train, *(s.problems for s in task.evals.values())) for p in problems]
    if len(set(uids)) < len(uids):
        twice = collections.Counter(uids).most_common(1)[0][0]
        raise ValueError(f"task.name={config.name}: no two problems, trained on or not, may share a uid: {twice!r}")
    return task


def _require_scorers(config: TaskConfig, reward: RewardConfig) -> None:
    scorer = reward.scorer
    if isinstance(scorer, dict) and config.name != "files":
        raise ValueError("reward.scorer by data_source belongs to task.name=files: other problems have none")
    for name in [] if scorer is None else [scorer] if isinstance(scorer, str) else scorer.values():
        try:
            scorer_target(name)
        except ValueError as e:
            raise ValueError(f"reward.scorer: {e}") from None


def _scored_by(task: Task, reward: RewardConfig) -> Task:
    """The task with one scorer for all, if one is given; a scorer that is not there is found now and not in a worker."""
    scorer = reward.function or (reward.scorer if isinstance(reward.scorer, str) else None)
    if scorer is not None:

        def changed(problems: Sequence[Problem]) -> list[Problem]:
            return [dataclasses.replace(p, reward=scorer) for p in problems]

        evals = {name: dataclasses.replace(s, problems=changed(s.problems)) for name, s in task.evals.items()}
        task = dataclasses.replace(task, train=changed(task.train), evals=evals)
    argument = "reward.function" if reward.function else "reward.scorer" if reward.scorer else "Problem.reward"
    for name in {p.reward for problems in (task.train, *(s.problems for s in task.evals.values())) for p in problems}:
        if plugins.is_target(name):
            plugins.load(name, argument)
    return task
