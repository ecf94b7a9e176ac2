"""What the embedded models are pretrained on: documents without end."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from grpo_engine.micro import _corpus
from grpo_engine.micro.facts import CORPUS_TERMS, LIST_LENGTHS, NAME_COUNTS, CorpusConfig
from grpo_engine.micro.task import native_source
from grpo_engine.micro.tokenizer import MicroTokenizer


@dataclass(frozen=True, slots=True)
class Document:
    """A problem and an answer to it, as one sequence of tokens."""

    prompt: str
    tokens: list[int]
    weights: list[float]  # loss weight of each token; the first token's is never used


class Corpus:
    """Documents without end, drawn natively; an iterator of `Document`s that also gives them packed.

    Args:
        seed: names the stream; the same name gives the same documents on every machine.
        config: shares, noise and weights.
        held_out: keys that must not appear (see `held_out_keys`); every document is checked against them and
            against the test pool.

    Raises:
        RuntimeError: (when iterated) a document holds a test problem (never, unless the generator is broken).
    """

    def __init__(self, seed: str, *, config: CorpusConfig | None = None, held_out: Collection[str] = ()) -> None:
        self._config = c = config or CorpusConfig()
        self._tokenizer = MicroTokenizer()
        self._native = _corpus.MicroCorpus(
            native_source(seed),
            domains=(c.chain, c.word, c.code, c.logic),
            direct=c.direct,
            error=c.error,
            chat=c.chat,
            prompt_weight=c.prompt_weight,
            sum_terms=CORPUS_TERMS,
            list_lengths=LIST_LENGTHS,
            name_counts=NAME_COUNTS,
            held_out=set(held_out),
        )

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        tokens, prompt = self._native.document()
        weights = [self._config.prompt_weight] * prompt + [1.0] * (len(tokens) - prompt)
        return Document(self._tokenizer.decode(tokens[:prompt]), tokens, weights)

    def batch(self, documents: int, *, max_tokens: int | None = None) -> tuple[np.ndarray, ...]:
        """The next documents packed end to end, each without its last token, which is predicted and never read.

        Args:
            documents: how many.
            max_tokens: fewer documents, as soon as they hold so many inputs.

        Returns:
            tokens [T] int64, cu_seqlens [N+1] int32, target [T] int64 (the token after each), weight [T] float32 of
            each target.
        """
        return self._native.batch(documents, 2**31 - 1 if max_tokens is None else max_tokens)
