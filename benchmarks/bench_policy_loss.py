"""policy_loss beside TRL's formula, forward and backward."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the repository, however this file is started
import torch  # noqa: E402

from benchmarks import peers  # noqa: E402
from benchmarks.shapes import cumulative, equal_lengths, log_normal_lengths  # noqa: E402
from benchmarks.table import Case, WrongAnswer, main, relative_error, same_bits  # noqa: E402
from grpo_engine import ops  # noqa: E402

TOLERANCE = 1e-5  # of the loss, and of the largest gradient


def case(N, R, kind, *, compiled, metrics=False):
    lengths = (equal_lengths if kind == "equal" else log_normal_lengths)(N, R)
    total, cu = sum(lengths), cumulative(lengths)
    logprob = (-torch.rand(total) * 3).requires_grad_()
    # in steps of 1/64: no ratio comes so near a clip that rounding decides whether a token has a gradient
    old, ref = (logprob.detach() + (torch.randn(total) * s * 64).round() / 64 for s in (0.1, 0.3))
    advantage = torch.randn(N)
    each = torch.repeat_interleave(advantage, torch.tensor(lengths))
    one = torch.ones(())

    def padded(x):
        return peers.padded(x.detach().split(lengths), 0)

    wide = padded(logprob).requires_grad_()
    old_NR, ref_NR = padded(old), padded(ref)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float()
    kept = mask.bool()

    def ours(logprob):
        loss, stats = ops.policy_loss(
            logprob, advantage=each, cu_seqlens=cu, old_logprob=old, ref_logprob=ref, kl_coef=0.001
        )  # fmt: skip
        if metrics:
            stats.tolist()
        return loss

    def theirs(function, leaf, *others):
        return peers.with_gradients(lambda x: function(x, *others), [leaf], [one])

    others = [old_NR, ref_NR, advantage, mask]
    formula = peers.trl_loss_and_metrics if metrics else peers.trl_loss
    rivals = {"TRL's formula, eager": lambda: theirs(formula, wide, *others)}
    if compiled:
        fast = torch.compile(formula, dynamic=False)
        rivals["the same, torch.compile"] = lambda: theirs(fast, wide, *others)

    truth = peers.with_gradients(
        lambda x: peers.trl_loss(x, *(o.double() for o in others)),
        peers.doubled([wide]),
        [torch.ones((), dtype=torch.float64)],
    )
    truth[1] = truth[1][kept]

    def packed(result):
        loss, gradient = result
        return [loss, gradient[kept] if gradient.dim() == 2 else gradient]

    def check(who, result):
        error = relative_error(packed(result), truth)
        if not error <= TOLERANCE:
            raise WrongAnswer(f"error {error:.3g}, allowed {TOLERANCE:.3g}")

    def alone(whole):
        n = lengths[0]
        leaf = logprob.detach()[:n].clone().requires_grad_()
        loss = ops.policy_loss(
            leaf, advantage=each[:n], cu_seqlens=cu[:2], old_logprob=old[:n], ref_logprob=ref[:n], kl_coef=0.001,
            num_tokens=total,
        ).loss  # fmt: skip
        return same_bits(torch.autograd.grad(loss, [leaf]), [whole[1][:n]])

    return Case(
        name=f"{N} sequences of {R}, {kind} lengths (longest {max(lengths)})" + (", with metrics" if metrics else ""),
        ours=lambda: peers.with_gradients(ours, [logprob], [one]),
        peers=rivals,
        tolerance=TOLERANCE,
        check=check,
        alone=alone,
        nbytes=4.0 * 5 * total,
    )


def cases(quick):
    yield case(256, 16, "equal", compiled=not quick)
    yield case(64, 512, "equal", compiled=True)
    if not quick:
        yield case(64, 512, "log-normal", compiled=True)
    yield case(256, 16, "equal", compiled=False, metrics=True)
    yield case(64, 512, "equal", compiled=False, metrics=True)


def cuda(quick):
    yield partial(case, 64, 512, "equal", compiled=not quick)
    yield partial(case, 64, 512, "equal", compiled=False, metrics=True)
    yield partial(case, 256, 1024, "log-normal", compiled=True)
    if not quick:
        yield partial(case, 256, 1024, "log-normal", compiled=False, metrics=True)


if __name__ == "__main__":
    note = "With metrics: those that TRL logs beside the loss; ours has its ten at all times."
    main("policy_loss", cases, cuda=cuda, note=note)
