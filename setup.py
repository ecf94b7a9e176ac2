"""Drives CMake (CMakeLists.txt holds the list of native sources) and packs the result in a wheel."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds the native targets: ``grpo_engine._C`` and ``grpo_engine.micro._corpus``."""

    def build_extensions(self) -> None:
        cuda, build = self._cuda_wanted(), self._folder()
        configure = [
            "cmake",
            "-S",
            ROOT,
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGRPO_ENGINE_CUDA={'ON' if cuda else 'OFF'}",
            f"-DGRPO_ENGINE_OPENMP={'ON' if self._openmp_wanted() else 'OFF'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # beside the interpreter first: cmake and ninja come from PyPI, and venv/bin need not be on PATH
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run([str(a) for a in configure], check=True, env=env)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True, env=env)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # by a rename: a process that has the old file mapped keeps it, and does not crash
        new = output.with_suffix(".new")
        shutil.copy2(self._folder() / output.name, new)
        os.replace(new, output)

    @staticmethod
    def _folder() -> Path:
        return Path(os.environ.get("GRPO_ENGINE_BUILD_DIR", ROOT / "build" / "native"))

    @staticmethod
    def _openmp_wanted() -> bool:
        wanted = os.environ.get("GRPO_ENGINE_OPENMP", "1")
        if wanted not in ("0", "1"):
            raise SystemExit(f"GRPO_ENGINE_OPENMP must be 0 or 1, got {wanted!r}")
        if wanted == "0":
            print("grpo_engine: building without OpenMP: every kernel runs on one thread", flush=True)
        return wanted == "1"

    @staticmethod
    def _cuda_wanted() -> bool:
        """Whether the CUDA kernels are built; says so."""
        wanted = os.environ.get("GRPO_ENGINE_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            raise SystemExit(f"GRPO_ENGINE_CUDA must be auto, 0 or 1, got {wanted!r}")
        import torch

        cuda_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        missing = []
        if not (shutil.which("nvcc") or (cuda_home / "bin" / "nvcc").exists()):
            missing.append("nvcc (on PATH, or in CUDA_HOME)")
        if torch.version.cuda is None:
            missing.append(f"a torch with CUDA (found {torch.__version__})")
        if wanted == "1" and missing:
            raise SystemExit(f"GRPO_ENGINE_CUDA=1 needs {' and '.join(missing)}")
        cuda = wanted != "0" and not missing
        why = "GRPO_ENGINE_CUDA=0" if wanted == "0" else f"without {' and '.join(missing)}"
        print(f"grpo_engine: building the CPU {'and CUDA kernels' if cuda else f'kernels only ({why})'}", flush=True)
        return cuda


EXTENSIONS = ("grpo_engine._C", "grpo_engine.micro._corpus")

setup(ext_modules=[Extension(name, sources=[]) for name in EXTENSIONS], cmdclass={"build_ext": CMakeBuild})
