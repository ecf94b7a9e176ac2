"""What training in bfloat16 rests on: float32 masters, moments and sums of gradients."""

import models
import pytest
import torch
from conftest import DEVICES

from grpo_engine.model.decoder import Model
from grpo_engine.train import checkpoint
from grpo_engine.train.optimizer import adamw, update


def masters(model, optimizer):
    """The float32 weights of a bfloat16 model."""
    return {
        name: ((p.detach().view(torch.int16).long() << 16) + optimizer.state[p]["master_low"]).int().view(torch.float32)
        for name, p in model.named_parameters()
    }


def micro_batch(model, seed):
    """Adds the gradient of some sequences of 24 tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(97, (24,), generator=generator).to(model.device)
    logprob, _ = model.logprobs(tokens, torch.tensor([0, 24], dtype=torch.int32, device=model.device))
    (-0.01 * logprob.mean()).backward()


def pair(place="cpu"):
    """The same weights in bfloat16 and float32, with optimizers."""
    half = models.random_model(dtype=torch.bfloat16).to(place)
    whole = Model(half.config).to(place)
    whole.load_state_dict(half.state_dict())
    return [(m, adamw(m.parameters(), lr=1e-6, betas=(0.9, 0.999))) for m in (half, whole)]


@pytest.mark.parametrize("place", DEVICES)
def test_steps_of_1e_6_move_bfloat16_weights_as_their_masters_say(place):
    (model, optimizer), (exact, its_optimizer) = pair(place)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(20):
        micro_batch(model, step)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.clone()
        update(optimizer, lr=1e-6, clip_norm=1e9)
        update(its_optimizer, lr=1e-6, clip_norm=1e9)
    moved = 0
    for (name, master), q in zip(masters(model, optimizer).items(), exact.parameters(), strict=True):
        assert torch.equal(master, q.detach())  # to the bit, as if the weights were float32
        weight = dict(model.named_parameters())[name].detach()
        assert ((weight.float() - master).abs() <= 2.0**-8 * master.abs()).all()  # and seen to the nearest bfloat16
        moved += int((weight != before[name]).sum())
    assert moved > 100  # of 20 steps of 1e-6, each a hundredth of the distance between two bfloat16 numbers or less


def test_the_state_is_float32_and_a_checkpoint_brings_all_of_it_back(tmp_path):
    def step(model, optimizer, number):
        micro_batch(model, number)
        update(optimizer, lr=1e-4, clip_norm=1.0)

    (model, optimizer), _ = pair()
    for number in range(3):
        step(model, optimizer, number)
    for p in model.parameters():
        state = optimizer.state[p]
        assert {k: v.dtype for k, v in state.items()} == {
            "step": torch.float32, "exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master_low": torch.int16,
        }  # fmt: skip
    checkpoint.save(tmp_path, model=model, optimizer=optimizer, step=3, config_hash="h", lengths={}, meta={})
    again, its_optimizer = pair()[0]
    checkpoint.load(tmp_path, config_hash="h").restore(again, its_optimizer)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(again, its_optimizer, number)
    for a, b in zip(masters(model, optimizer).values(), masters(again, its_optimizer).values(), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_micro_batches_are_added_in_float32():
    (model, _), _ = pair()
    parts = []
    for seed in range(8):
        micro_batch(model, seed)
        parts.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
    for seed in range(8):
        micro_batch(model, seed)
    for name, p in model.named_parameters():
        want = parts[0][name]
        for part in parts[1:]:
            want = want + part[name]
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, want)


def test_float32_weights_have_no_master():
    _, (model, optimizer) = pair()
    micro_batch(model, 0)
    update(optimizer, lr=1e-6, clip_norm=1.0)
    assert {k for s in optimizer.state.values() for k in s} == {"step", "exp_avg", "exp_avg_sq"}
