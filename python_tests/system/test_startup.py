"""A process starts without what it never uses."""

import subprocess
import sys
from pathlib import Path

import models

from grpo_engine.model import weights

ROOT = Path(__file__).resolve().parents[2]


def test_a_model_and_an_optimizer_are_made_without_torchs_compiler(tmp_path):
    weights.save_checkpoint(models.random_model(), tmp_path / "m")
    code = f"""
import pathlib, sys, torch
from grpo_engine.micro import pretrain
from grpo_engine.model import weights
from grpo_engine.run import run
from grpo_engine.system import startup
startup.skip_compiler()
model = weights.load_model(pathlib.Path({str(tmp_path / "m")!r}), dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert out.stdout.strip() == "False"
