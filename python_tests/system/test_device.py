"""Where a run computes: what auto means, refusals before any work, and how batches get there."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICES

from grpo_engine.records.ledger import Ledger
from grpo_engine.system import device
from grpo_engine.train.batch import pack
from grpo_engine.types import TrainBatch


@pytest.fixture
def machine(monkeypatch):
    """Pretends GPUs and a build with or without CUDA kernels."""

    def make(*, gpus: int, kernels: bool):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(device, "has_cuda_kernels", lambda: kernels)

    return make


@pytest.mark.parametrize("gpus,kernels,want", [(0, False, "cpu"), (2, False, "cpu"), (0, True, "cpu"), (1, True, "cuda")])
def test_auto_is_cuda_where_a_gpu_and_kernels_are(machine, gpus, kernels, want):
    machine(gpus=gpus, kernels=kernels)
    assert device.resolve("auto") == want and device.resolve("cpu") == "cpu"


def test_cuda_is_refused_with_what_to_do(machine):
    machine(gpus=1, kernels=False)
    with pytest.raises(ValueError, match="no CUDA kernels .* build again with nvcc .* or set device=cpu"):
        device.resolve("cuda")
    machine(gpus=0, kernels=True)
    with pytest.raises(ValueError, match="torch sees no GPU .* nvidia-smi, or set device=cpu"):
        device.resolve("cuda")
    machine(gpus=1, kernels=True)
    assert device.resolve("cuda") == "cuda"


def test_a_gpu_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match="Tesla T4 has compute capability 7.5, and the CUDA kernels need 8.0"):
        device.require_capability()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    device.require_capability()


def test_gpus_are_named_as_the_environment_names_them(machine, monkeypatch):
    machine(gpus=2, kernels=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert device.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8f6d,-1")
    assert device.visible_gpus() == ["5", "GPU-8f6d"]
    machine(gpus=0, kernels=True)
    assert device.visible_gpus() == []


@pytest.mark.parametrize("place", DEVICES)
def test_a_batch_moves_whole(place):
    rollout = SimpleNamespace(
        tokens=torch.tensor([5, 9, 2, 5, 9, 7, 2]), cu_seqlens=torch.tensor([0, 3, 7], dtype=torch.int32),
        prompt_len=torch.tensor([2, 2], dtype=torch.int32), logprob=torch.arange(7.0), group_size=2,
        temperature=1.0, response_len=torch.tensor([1, 2]),
    )  # fmt: skip
    batch = pack(rollout, torch.tensor([0.5, -0.5]), sequences=[0, 1])
    moved = device.move(batch, torch.device(place))
    assert (moved is batch) == (place == "cpu") and moved.num_inputs == batch.num_inputs and moved.ref_logprob is None
    for name in TrainBatch.__slots__:
        if isinstance(value := getattr(batch, name), torch.Tensor):
            assert getattr(moved, name).device.type == place and torch.equal(getattr(moved, name).cpu(), value)


@pytest.mark.parametrize("place", DEVICES)
def test_the_ledger_times_what_the_device_does(place):
    ledger = Ledger(device=place)
    x = torch.randn(500, 500, device=place)
    with ledger.timed("forward", tokens=3, flops=5.0):
        for _ in range(20):
            x = (x @ x).tanh()
    with ledger.timed("optimizer"):
        pass
    cost = ledger.close_step()
    assert cost["forward"].tokens == 3 and cost["forward"].seconds > cost["optimizer"].seconds >= 0
    assert ledger.flops_without_evaluation == 5.0 and ledger.close_step() == {}
