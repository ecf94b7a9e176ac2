"""What the tests share: the folder of real problems, and bars that need no magic number."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real problems: GRPO_ENGINE_DATA, by default ../shared/data beside the checkout."""
    folder = Path(os.environ.get("GRPO_ENGINE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real problems are absent: GRPO_ENGINE_DATA={folder} is no folder")
    return folder


@pytest.fixture
def one_and_two_threads():
    """Yields a function that runs a thunk with 1 and with 2 threads and returns both results."""
    before = torch.get_num_threads()

    def run(thunk):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(thunk())
        return results

    yield run
    torch.set_num_threads(before)
