"""The embedded ladder: models that are pretrained in seconds, and the control that asks what RL really added.

A *base* model reads the micro corpus (`grpo_engine.tasks.micro.Corpus`) with a learning rate that is annealed to
nearly nothing: from an unannealed base, a little plain pretraining looks like what RL does. An *instruct* model is
its base and a short second training on chat documents of the same corpus. Models are trained once and kept under
the user's cache folder, named by a hash of everything that decides their weights; on the CPU, so that they are the same
wherever they were made.

The *control* goes on with that training instead of RL: the base's own corpus, learning rate and annealing, for at
least as many tokens a step as RL trains on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from grpo_engine.config import RunConfig
from grpo_engine.device import move
from grpo_engine.ledger import Ledger, causal_pairs, forward_flops
from grpo_engine.memory import keep_freed_memory
from grpo_engine.model import Model, ModelConfig
from grpo_engine.optimizer import adamw, update
from grpo_engine.tasks import micro
from grpo_engine.tasks.micro import Corpus, CorpusConfig

Kind = Literal["base", "instruct"]
Progress = Callable[[int, int, float], None]  # (tokens read, tokens to read, loss)

VERSION = 3  # raise it when code that decides the weights changes in a way that the recipe does not show
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Tokens to read, and the learning rate on the way: linear warm-up, constant, linear annealing."""

    tokens: int
    lr: float
    warmup: float = 0.025  # share of the tokens
    anneal: float = 0.5  # share of the tokens, at the end
    floor: float = 0.03  # the last rate, as a share of lr

    def rate(self, done: float) -> float:
        """The learning rate.

        Args:
            done: share of the tokens that were read, in [0, 1].

        Returns:
            The rate; it is never 0, so that the first step moves the weights.
        """
        up = min(1.0, (done + 1e-3) / self.warmup) if self.warmup else 1.0
        down = min(1.0, (1.0 - done) / self.anneal) if self.anneal else 1.0
        return self.lr * up * (self.floor + (1.0 - self.floor) * max(down, 0.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroRecipe:
    """Everything that decides the weights of one model of the ladder."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    base: Schedule
    instruct: Schedule
    corpus: CorpusConfig = CorpusConfig()
    documents: int = 64  # of an optimizer step
    betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 0  # of the first weights and of the corpus


def _recipe(width: int, layers: int, heads: int, kv_heads: int, ffn: int, lr: float) -> MicroRecipe:
    return MicroRecipe(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        base=Schedule(tokens=1_200_000, lr=lr),
        # chat documents are 15 % of the base's corpus: the second training is short and gentle
        instruct=Schedule(tokens=200_000, lr=lr * 0.3, warmup=0.1, anneal=0.9),
    )


LADDER: dict[str, MicroRecipe] = {  # non-embedding parameters:
    "xxs": _recipe(16, 2, 2, 1, 48, 1e-2),  # 6 thousand
    "xs": _recipe(32, 2, 2, 1, 80, 6e-3),  # 22 thousand
    "s": _recipe(48, 3, 3, 1, 128, 4e-3),  # 74 thousand
    "m": _recipe(96, 3, 6, 2, 256, 2e-3),  # 296 thousand
    "l": _recipe(160, 4, 10, 2, 384, 1.2e-3),  # 985 thousand
}


def recipe(size: str, *, seed: int = 0) -> MicroRecipe:
    """The recipe of a model.

    Args:
        size: a key of `LADDER`.
        seed: of its first weights and corpus: each makes another model of the size.

    Returns:
        Its recipe.

    Raises:
        ValueError: no such size; the message lists them.
    """
    if size not in LADDER:
        raise ValueError(f"the embedded ladder has no size {size!r}; it has {', '.join(LADDER)}")
    return dataclasses.replace(LADDER[size], seed=seed)


def architecture(size: str) -> ModelConfig:
    """The architecture of a size.

    Args:
        size: a key of `LADDER`.

    Returns:
        A `ModelConfig` with the vocabulary of `MicroTokenizer`.

    Raises:
        ValueError: no such size.
    """
    return _architecture(recipe(size))


def _architecture(r: MicroRecipe) -> ModelConfig:
    return ModelConfig(
        vocab_size=len(micro.VOCABULARY),
        hidden_size=r.width,
        intermediate_size=r.ffn,
        num_hidden_layers=r.layers,
        num_attention_heads=r.heads,
        num_key_value_heads=r.kv_heads,
        head_dim=r.width // r.heads,
        rope_theta=10_000.0,
        max_position_embeddings=64,
    )


def training_tokens(size: str, kind: Kind) -> int:
    """Tokens that making a model reads; an instruct model's own, without its base's.

    Args:
        size: a key of `LADDER`.
        kind: "base" or "instruct".

    Returns:
        Tokens.

    Raises:
        ValueError: no such size or kind.
    """
    return _schedule(recipe(size), kind).tokens


def _schedule(r: MicroRecipe, kind: str) -> Schedule:
    if kind not in ("base", "instruct"):
        raise ValueError(f"kind must be 'base' or 'instruct', got {kind!r}")
    return r.base if kind == "base" else r.instruct


# ------------------------------------------------------------------------------------- language modelling


@dataclass(frozen=True, slots=True)
class DocumentBatch:
    """Packed documents of one optimizer step: N of them, T inputs."""

    tokens: Tensor  # [T] int64, each document without its last token, which is predicted and never read
    cu_seqlens: Tensor  # [N+1] int32
    target: Tensor  # [T] int64, the token after each input
    weight: Tensor  # [T] float32, loss weight of each target


def document_batch(corpus: Corpus, documents: int, *, max_tokens: int | None = None) -> DocumentBatch:
    """The next documents of a corpus, packed; see `Corpus.batch`."""
    return DocumentBatch(*map(torch.from_numpy, corpus.batch(documents, max_tokens=max_tokens)))


def language_loss(model: Model, batch: DocumentBatch) -> Tensor:
    """Weighted mean cross-entropy of the next token, in nats.

    Args:
        model: the model.
        batch: packed documents, on the model's device.

    Returns:
        Scalar float32, ``-sum(weight * logprob) / sum(weight)``, differentiable in the weights.
    """
    rows = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
    logprob, _ = model.logprobs(batch.tokens, batch.cu_seqlens, rows=rows, target=batch.target)
    return -(batch.weight * logprob).sum() / batch.weight.sum()


def train_language(
    model: Model,
    schedule: Schedule,
    *,
    batches: Iterator[DocumentBatch],
    betas: tuple[float, float],
    progress: Progress | None = None,
) -> float:
    """Reads batches of documents until the schedule's tokens are spent.

    Args:
        model: trained in place.
        schedule: tokens and learning rate.
        batches: documents of one optimizer step each.
        betas: of AdamW, which has no weight decay here.
        progress: called every step.

    Returns:
        The last step's loss.

    Raises:
        RuntimeError: the training diverged, or a document holds a test problem.
    """
    keep_freed_memory()
    optimizer = adamw(model.parameters(), lr=schedule.lr, betas=betas)
    done, loss = 0, math.nan
    while done < schedule.tokens:
        batch = next(batches)
        step_loss = language_loss(model, batch)
        step_loss.backward()
        update(optimizer, lr=schedule.rate(done / schedule.tokens), clip_norm=CLIP_NORM)
        done += batch.tokens.numel()
        loss = float(step_loss.detach())
        if progress is not None:
            progress(min(done, schedule.tokens), schedule.tokens, loss)
    return loss


# ------------------------------------------------------------------------------------------------ cache


def cache_root() -> Path:
    """Where trained models are kept: $XDG_CACHE_HOME/grpo_engine, or ~/.cache/grpo_engine."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "grpo_engine"


def model_key(size: str, kind: Kind, *, seed: int = 0) -> str:
    """The name of a trained model: readable, and a hash of all that decides its weights.

    Args:
        size: a key of `LADDER`.
        kind: "base" or "instruct".
        seed: see `recipe`.

    Returns:
        For instance "xs-base-0-0123456789ab". A base's name does not depend on the recipe of its instruct model.

    Raises:
        ValueError: no such size or kind.
    """
    r = recipe(size, seed=seed)
    _schedule(r, kind)
    facts = {"version": VERSION, "recipe": dataclasses.asdict(r), "tasks": _task_facts()}
    if kind == "base":
        del facts["recipe"]["instruct"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{size}-{kind}-{seed}-{digest[:12]}"


def _task_facts() -> dict[str, object]:
    """What the micro tasks put into every document."""
    return {
        "vocabulary": micro.VOCABULARY,
        "limit": micro.LIMIT,
        "operand": micro.OPERAND,
        "terms": [micro.CORPUS_TERMS, micro.LIST_LENGTHS, micro.NAME_COUNTS],
        "test_share": micro.TEST_SHARE,
    }


def cached_model(size: str, kind: Kind, *, seed: int = 0, cache_dir: Path | str | None = None) -> Path | None:
    """The folder of a model that was trained before.

    Args:
        size: a key of `LADDER`.
        kind: "base" or "instruct".
        seed: see `recipe`.
        cache_dir: default `cache_root()`.

    Returns:
        Its folder, or None when it is not there.

    Raises:
        ValueError: no such size or kind.
    """
    folder = Path(cache_dir or cache_root()) / "models" / model_key(size, kind, seed=seed)
    return folder if folder.is_dir() else None


def ensure_model(
    size: str,
    kind: Kind,
    *,
    seed: int = 0,
    cache_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder of a trained model of the ladder; trains it when it is not in the cache.

    The folder appears by one rename when it is complete. Processes that ask for one model at once wait for the
    first of them; a process that is killed leaves nothing behind that counts as a model.

    Args:
        size: a key of `LADDER`.
        kind: "base" or "instruct"; an instruct model makes, or finds, its base first.
        seed: see `recipe`; an instruct model's is that of its base.
        cache_dir: default `cache_root()`.
        progress: called every optimizer step of a training.

    Returns:
        A Hugging Face checkpoint folder (config.json, safetensors).

    Raises:
        ValueError: no such size or kind.
        RuntimeError: the training diverged.
        OSError: the cache folder cannot be written to.
    """
    from grpo_engine import weights

    folder = Path(cache_dir or cache_root()) / "models" / model_key(size, kind, seed=seed)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    base = None
    if kind == "instruct":
        base = ensure_model(size, "base", seed=seed, cache_dir=cache_dir, progress=progress)
    with _locked(folder.with_suffix(".lock")):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        r = recipe(size, seed=seed)
        if base is None:
            model = Model(_architecture(r)).init_weights(r.seed, std=None)
        else:
            model = weights.load_model(base, dtype=torch.float32)
        train_language(
            model,
            _schedule(r, kind),
            batches=_batches(r, f"{kind}/{r.seed}", chat_only=kind == "instruct"),
            betas=r.betas,
            progress=progress,
        )
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            weights.save_checkpoint(model, temporary)
            temporary.chmod(0o755)  # mkdtemp makes folders private; a model is not a secret
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _batches(r: MicroRecipe, seed: str, *, chat_only: bool) -> Iterator[DocumentBatch]:
    config = dataclasses.replace(r.corpus, chat=1.0) if chat_only else r.corpus
    corpus = Corpus(seed, config=config, held_out=_held_out())
    while True:
        yield document_batch(corpus, r.documents)


@functools.cache
def _held_out() -> frozenset[str]:
    return micro.held_out_keys([*micro.eval_sets().values(), *micro.eval_sets(selection=True).values()])


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file; the operating system frees it when the process ends, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------- control


class ControlCorpus:
    """Documents of the control's steps: each step's are a function of (run seed, step) alone, so a run can resume.

    Args:
        r: recipe of the size; the control goes on with its corpus and learning rate.
        seed: of the run; its documents are others than those of pretraining.
        chat: an instruct model's control reads chat documents, as its second training did.
        tokens: that a step reads, or the few more that end its last batch of documents.
    """

    def __init__(self, r: MicroRecipe, *, seed: int, chat: bool, tokens: int) -> None:
        self.recipe = r
        self.tokens = tokens
        self._name = f"control/{r.seed}/{seed}"
        self._config = dataclasses.replace(r.corpus, chat=1.0) if chat else r.corpus

    def batches(self, step: int) -> Iterator[DocumentBatch]:
        """The optimizer steps of one run step.

        Args:
            step: 1 is the first.

        Yields:
            `DocumentBatch`es of `recipe.documents` documents each, until `tokens` are reached; the last holds
            as many documents as it still takes.
        """
        corpus = Corpus(f"{self._name}/{step}", config=self._config, held_out=_held_out())
        left = self.tokens
        while left > 0:
            batch = document_batch(corpus, self.recipe.documents, max_tokens=left)
            left -= batch.tokens.numel()
            yield batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlOutcome:
    """What one step of the control did."""

    trained_tokens: int  # inputs of the training pass
    loss: float  # mean over the step's optimizer steps
    grad_norm: float  # before clipping, likewise


def control_corpus(config: RunConfig) -> ControlCorpus:
    """The documents that a control run reads.

    Args:
        config: of the run; model.size, .kind and .seed, seed, and batch.prompts x batch.group_size answers a step, each
            counted as long as a fully worked one: at least as many tokens as the RL run trains on.

    Returns:
        A `ControlCorpus`.

    Raises:
        ValueError: the model is a folder, whose corpus nobody knows, or no such size.
    """
    if config.model.size is None:
        raise ValueError("method=pretrain needs model.size: a control goes on with the corpus of an embedded model")
    chat = config.model.kind == "instruct"
    answers = config.batch.prompts * config.batch.group_size
    tokens = round(answers * micro.tokens_per_worked_answer(chat=chat))
    return ControlCorpus(recipe(config.model.size, seed=config.model.seed), seed=config.seed, chat=chat, tokens=tokens)


def control_step(
    model: Model,
    optimizer: torch.optim.Optimizer,
    corpus: ControlCorpus,
    *,
    config: RunConfig,
    step: int,
    ledger: Ledger,
) -> ControlOutcome:
    """Plain language modelling in the place of one GRPO step.

    The rate starts at the base's full learning rate and falls linearly to the floor of the base's schedule at the
    last step of the run: the most that plain pretraining can make of these tokens.

    Args:
        model: trained in place.
        optimizer: over its parameters; its learning rate is set here.
        corpus: of the run.
        config: of the run; its steps are the length of the annealing.
        step: 1 is the first.
        ledger: books the cost under "forward", "backward" and "optimizer".

    Returns:
        A `ControlOutcome`.

    Raises:
        RuntimeError: the training diverged.
    """
    base = corpus.recipe.base
    schedule = Schedule(tokens=corpus.tokens * config.steps, lr=base.lr, warmup=0.02, anneal=1.0, floor=base.floor)
    losses, norms, done = [], [], 0
    for batch in corpus.batches(step):
        T = batch.tokens.numel()
        pairs = sum(causal_pairs(n) for n in (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist())
        flops = forward_flops(model, tokens=T, pairs=pairs, head_rows=T)
        with ledger.timed("forward", tokens=T, flops=flops):
            loss = language_loss(model, move(batch, model.device))
        with ledger.timed("backward", tokens=T, flops=2 * flops):
            loss.backward()
        with ledger.timed("optimizer"):
            share = (step - 1 + min(done / corpus.tokens, 1.0)) / config.steps
            norms.append(update(optimizer, lr=schedule.rate(share), clip_norm=CLIP_NORM))
        losses.append(float(loss.detach()))
        done += T
    return ControlOutcome(
        trained_tokens=done, loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms)
    )
