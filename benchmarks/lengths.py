"""Answers of given lengths: a measurement's own stopping rule, for us and for transformers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo_engine import _C


@contextlib.contextmanager
def answer_lengths(lengths: Sequence[int]) -> Iterator[None]:
    """Makes each group's answers as long as asked, in place of one limit for all: a measurement's stopping rule."""
    wanted = itertools.cycle(lengths)

    class Scheduler(_C.Scheduler):
        def add_group(self, prompt, *, max_new_tokens, **others):
            return super().add_group(prompt, max_new_tokens=next(wanted), **others)

    with mock.patch.object(_C, "Scheduler", Scheduler):
        yield


def stopping_criteria(prompt: int, lengths: Sequence[int]) -> list[Any]:
    """The same for transformers' `generate`.

    Args:
        prompt: tokens of each (padded) prompt.
        lengths: new tokens of each row; the longest is left to max_new_tokens.

    Returns:
        What `generate` takes as stopping_criteria; nothing when all are equal.
    """
    from transformers import StoppingCriteria

    longest = max(lengths)
    if min(lengths) == longest:
        return []
    wanted = torch.tensor(lengths)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return (input_ids.shape[1] - prompt >= wanted) & (wanted < longest)

    return [Stop()]
