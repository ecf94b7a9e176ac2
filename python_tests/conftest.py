"""What the tests share: devices, the folder of real problems, one thread and several.

GRPO_ENGINE_EXTENSION names a folder with another build of the extension. With build/native/emulated, ops that have
a CUDA kernel run it on CPU tensors, on a machine without a GPU (csrc/tests/cuda_emulator.h).

GRPO_ENGINE_ONE_OP_TEST_IN=3 leaves two thirds of the op tests out, by a hash of their names: the emulator is slow.
"""

# ruff: noqa: E402  the wait policy is read when torch is loaded, the extension's folder before it is
import os

# Threads that wait sleep: spinning ones take the core from the thread that they wait for, where tests on more threads
# than there are cores, or several test processes, run side by side.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import grpo_engine

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = os.environ.get("GRPO_ENGINE_EXTENSION")
if EXTENSION:
    if not list(Path(EXTENSION).glob("_C.*")):
        raise FileNotFoundError(f"GRPO_ENGINE_EXTENSION={EXTENSION} has no extension")
    grpo_engine.__path__.insert(0, EXTENSION)
EMULATED = Path(EXTENSION or "").name == "emulated"
from grpo_engine.system.threads import count_threads, num_threads  # of that extension

# for code that a test runs in a process of its own, in ROOT: the same extension there
SAME_EXTENSION = "import sys; sys.path.insert(0, 'python_tests'); import conftest\n"

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


DEVICES = ["cpu", pytest.param("cuda", marks=NO_CUDA)]  # for code that is told where to compute


class DrawnOnCpu(TorchFunctionMode):
    """The same random numbers on every device: those of a CPU generator are drawn on the CPU, then moved."""

    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.rand, torch.randn, torch.randint, torch.randperm) and "generator" in kwargs:
            return func(*args, **{"device": "cpu", **kwargs}).to(kwargs.get("device", self._device))
        return func(*args, **kwargs)


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device in turn; tensors that the test makes without naming a device are on it."""
    with torch.device(request.param), DrawnOnCpu(request.param):
        yield request.param


def pytest_collection_modifyitems(config, items):
    one_in = int(os.environ.get("GRPO_ENGINE_ONE_OP_TEST_IN", "1"))
    left_out = {i for i in items if "/ops/" in i.nodeid and zlib.crc32(i.nodeid.encode()) % one_in}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [i for i in items if i not in left_out]


def pytest_runtest_logfinish(nodeid, location):
    """A fault ends this process's CUDA context, and every later test here would fail with it: pytest-xdist's worker
    leaves, and another takes its place."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as fault:
            print(f"after {nodeid}: {fault}", file=sys.__stderr__, flush=True)
            time.sleep(1)  # the test's report is on its way
            os._exit(1)


@pytest.fixture
def cpu_kernels(device):
    """For tests of what only the CPU kernels do, as reading the values of their inputs to check them."""
    if EMULATED or device == "cuda":
        pytest.skip("of the CPU kernels")


@pytest.fixture
def cuda_kernels(device):
    """For tests of what CUDA kernels do in their place."""
    if not EMULATED and device != "cuda":
        pytest.skip("of the CUDA kernels")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real problems: GRPO_ENGINE_DATA, by default ../shared/data beside the checkout."""
    folder = Path(os.environ.get("GRPO_ENGINE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real problems are absent: GRPO_ENGINE_DATA={folder} is no folder")
    return folder


@pytest.fixture
def one_thread():
    """Torch computes on one thread."""
    with num_threads(1):
        yield


THREADS = (1, 2, 3, 5, 8)  # more than there are cores is fine


@pytest.fixture
def on_threads(request):
    """Yields a function that runs a thunk on 1, 2, 3, 5 and 8 threads and returns all results.

    The test fails unless exactly so many threads took part in the thunk's kernels. Its work must be enough for eight of
    them, and 8 parts of equal size must cover its items (23 items do, 11 are done after six parts of two). The threads of
    several kernels count once, so a thunk holds one op in one direction where that can be.

    On CUDA and on the emulator no thread takes part: there the thunk is run twice, and nothing is counted.
    """
    counts = not EMULATED and ("device" not in request.fixturenames or request.getfixturevalue("device") == "cpu")

    def run(thunk):
        results = []
        for number in THREADS if counts else THREADS[:2]:
            with num_threads(number), count_threads() as count:
                results.append(thunk())
            if counts:
                assert count.number == number, f"{count.number} of {number} threads took part"
        return results

    return run


@pytest.fixture
def both_ways_on_threads(on_threads):
    """Yields a function that runs an op forwards, then backwards, on 1, 2, 3, 5 and 8 threads, which change no bit.

    It takes the function of leaves, the leaves and what comes from above, and returns the values and the gradients.
    """

    def run(function, leaves, upstream):
        with torch.no_grad():
            values = on_threads(lambda: function(*leaves))
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        outputs = function(*leaves)
        gradients = on_threads(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))
        assert_identical(values)
        assert_identical(gradients)
        return values[0], gradients[0]

    return run


def assert_identical(results):
    """Every result, a tensor or a number or a sequence of them, has the bits of the first; NaN equals NaN."""
    first, *others = (r if isinstance(r, (tuple, list)) else [r] for r in results)
    for other in others:
        for a, b in zip(first, other, strict=True):
            if isinstance(a, (tuple, list)):
                assert_identical([a, b])
            elif isinstance(a, torch.Tensor):
                assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
            else:
                assert a == b
