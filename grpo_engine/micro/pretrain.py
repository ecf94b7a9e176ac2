"""The models of the embedded ladder, pretrained in seconds and kept.

A *base* model reads the micro corpus (`grpo_engine.micro.corpus.Corpus`) with a learning rate that is annealed to
nearly nothing: from an unannealed base, a little plain pretraining looks like what RL does. An *instruct* model is
its base and a short second training on chat documents of the same corpus. Models are trained once and kept under
the user's cache folder, named by a hash of everything that decides their weights; on the CPU, so that they are the same
wherever they were made.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from grpo_engine.micro import task
from grpo_engine.micro.corpus import Corpus
from grpo_engine.micro.facts import CORPUS_TERMS, LIMIT, LIST_LENGTHS, NAME_COUNTS, OPERAND, TEST_SHARE, VOCABULARY
from grpo_engine.micro.ladder import Kind, MicroRecipe, architecture_of, recipe, schedule_of
from grpo_engine.micro.tokenizer import save_tokenizer
from grpo_engine.model import weights
from grpo_engine.model.decoder import Model
from grpo_engine.system.files import cache_root
from grpo_engine.system.locks import FOREVER, locked
from grpo_engine.train.language import DocumentBatch, Progress, train_language

VERSION = 3  # raise it when code that decides the weights changes in a way that the recipe does not show


def document_batch(corpus: Corpus, documents: int, *, max_tokens: int | None = None) -> DocumentBatch:
    """The next documents of a corpus, packed; see `Corpus.batch`."""
    return DocumentBatch(*map(torch.from_numpy, corpus.batch(documents, max_tokens=max_tokens)))


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
    schedule_of(r, kind)
    facts: dict[str, Any] = {"version": VERSION, "recipe": dataclasses.asdict(r), "tasks": _task_facts()}
    if kind == "base":
        del facts["recipe"]["instruct"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{size}-{kind}-{seed}-{digest[:12]}"


def _task_facts() -> dict[str, object]:
    """What the micro tasks put into every document."""
    return {
        "vocabulary": VOCABULARY,
        "limit": LIMIT,
        "operand": OPERAND,
        "terms": [CORPUS_TERMS, LIST_LENGTHS, NAME_COUNTS],
        "test_share": TEST_SHARE,
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
        A Hugging Face checkpoint folder: config.json, safetensors, tokenizer.json.

    Raises:
        ValueError: no such size or kind.
        RuntimeError: the training diverged.
        OSError: the cache folder cannot be written to.
    """
    folder = Path(cache_dir or cache_root()) / "models" / model_key(size, kind, seed=seed)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    base = None
    if kind == "instruct":
        base = ensure_model(size, "base", seed=seed, cache_dir=cache_dir, progress=progress)
    with locked(folder.with_suffix(".lock"), f"{folder}: another process makes this model", wait_s=FOREVER):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        r = recipe(size, seed=seed)
        if base is None:
            model = Model(architecture_of(r)).init_weights(r.seed, std=None)
        else:
            model = weights.load_model(base, dtype=torch.float32)
        train_language(
            model,
            schedule_of(r, kind),
            batches=_batches(r, f"{kind}/{r.seed}", chat_only=kind == "instruct"),
            betas=r.betas,
            progress=progress,
        )
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            weights.save_checkpoint(model, temporary)
            save_tokenizer(temporary)
            temporary.chmod(0o755)  # mkdtemp makes folders private; a model is not a secret
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _batches(r: MicroRecipe, seed: str, *, chat_only: bool) -> Iterator[DocumentBatch]:
    config = dataclasses.replace(r.corpus, chat=1.0) if chat_only else r.corpus
    corpus = Corpus(seed, config=config, held_out=tested_keys())
    while True:
        yield document_batch(corpus, r.documents)


@functools.cache
def tested_keys() -> frozenset[str]:
    return task.held_out_keys([*task.eval_sets().values(), *task.eval_sets(selection=True).values()])
