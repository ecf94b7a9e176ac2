"""doctor: what it measures, and that each check of threads fails where it should."""

import re
import subprocess
import sys

import pytest
import torch

from grpo_engine import _C, ops
from grpo_engine.system import doctor, threads


def check(name):
    (found,) = (c for c in doctor.checks() if c.name == name)
    return found


@pytest.mark.parametrize("number", [1, 2, 5])
def test_all_threads_of_torch_are_counted_in_a_kernel(number):
    with threads.num_threads(number):
        assert doctor.threads_of_a_kernel() == number
        assert doctor.facts()["threads"].startswith(f"{number} in a kernel, as counted; torch has {number}, ")
        assert check("a kernel uses all threads of torch").ok
        several = check("one and several threads give the same bits")
    assert several.ok and several.detail == f"rms_norm and its gradients on 1 and on {max(2, number)} threads, as counted"


def test_a_build_that_computes_on_one_thread_is_found_out(monkeypatch):
    monkeypatch.setattr(_C, "stop_counting_threads", lambda: 1)
    with threads.num_threads(3):
        fewer = check("a kernel uses all threads of torch")
        assert not fewer.ok and "1 took part, torch has 3" in fewer.detail and "GRPO_ENGINE_OPENMP=0" in fewer.detail
        same = check("one and several threads give the same bits")
        assert not same.ok and "on 1 and on 1 threads" in same.detail
    with threads.num_threads(1):  # torch has no more either, and the bits are still those of one thread
        assert not check("one and several threads give the same bits").ok


def test_bits_that_depend_on_threads_are_found_out():
    with threads.num_threads(2):
        found = doctor._same_bits_check(lambda x, w, eps: ops.rms_norm(x, w, eps=eps) * torch.get_num_threads())
    assert not found.ok and "on 1 and on 2 threads" in found.detail


def test_a_second_openmp_runtime_is_named(monkeypatch):
    monkeypatch.setattr(threads, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    (found,) = doctor._runtime_checks()
    assert not found.ok and found.detail.startswith("/a/libgomp.so.1, /b/libiomp5.so: each runs threads of its own")
    monkeypatch.setattr(threads, "openmp_runtimes", lambda: None)  # a system that does not say
    assert doctor._runtime_checks() == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loaded files are read from /proc")
def test_loaded_runtimes_are_found_under_the_names_that_wheels_give_them(tmp_path):
    (own,) = threads.openmp_runtimes()
    copies = [tmp_path / name for name in ("libgomp-98b21ff3.so.1.0.0", "libcompute.so")]
    for copy in copies:
        copy.write_bytes(open(own, "rb").read())
    code = (
        f"import ctypes, torch; [ctypes.CDLL(p) for p in {[str(c) for c in copies]}]; "
        "import sys; from grpo_engine.cli import main; sys.argv = ['grpo-engine', 'doctor']; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 1, out.stderr
    said = re.sub(r"\s", "", out.stdout)  # lines are wrapped
    assert "BROKENoneOpenMPruntime" in said and str(copies[0]) in said and own in said and str(copies[1]) not in said
