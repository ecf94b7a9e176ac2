"""Drives CMake (CMakeLists.txt holds the list of native sources) and packs the result in a wheel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the one native target, ``grpo_engine._C``."""

    def build_extension(self, ext: Extension) -> None:
        self._say_which_halves()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build = Path(os.environ.get("GRPO_ENGINE_BUILD_DIR", ROOT / "build" / "native"))
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        # beside the interpreter first: cmake and ninja come from PyPI, and venv/bin need not be on PATH
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([str(a) for a in configure], check=True, env=env)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True, env=env)
        # by a rename: a process that has the old file mapped keeps it, and does not crash
        new = output.with_suffix(".new")
        shutil.copy2(build / output.name, new)
        os.replace(new, output)

    @staticmethod
    def _say_which_halves() -> None:
        wanted = os.environ.get("GRPO_ENGINE_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"GRPO_ENGINE_CUDA must be auto, 0 or 1, got {wanted!r}")
        if wanted == "1":
            raise SystemExit("GRPO_ENGINE_CUDA=1: this version has no CUDA kernels yet; use auto or 0")
        print("grpo_engine: building the CPU kernels (this version has no CUDA kernels)", flush=True)


setup(ext_modules=[Extension("grpo_engine._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
