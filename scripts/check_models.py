"""Compares the models with transformers' at the sizes of published ones; no weights are needed.

    python scripts/check_models.py [--threads 1]

Counts of parameters of twelve published sizes, on the meta device. Random checkpoints of the true widths and vocabularies
with two layers, saved by transformers: logits in float32 and bfloat16, and transformers reading what is saved from here
in shards. A checkpoint of the 0.5B shape, in bfloat16: the peak of memory while it is loaded. Fails where a bound is
broken. A few minutes and 4 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))
from published import PUBLISHED, published  # noqa: E402

from grpo_engine.model import hf_config, weights  # noqa: E402
from grpo_engine.model.decoder import Model, Packed, packed_positions  # noqa: E402

WIDTHS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
LENGTHS = [56, 200]  # tokens of two sequences
FLOAT32_BOUND = 1e-4  # largest difference of a logit
BFLOAT16_BOUND = 2e-2  # norm of the difference over that of transformers' float32 logits
SHARD_BYTES = 200 * 10**6
LOADED = "Qwen2.5-0.5B"
MEMORY_BOUND = 1.15  # peak of a process's own memory while it loads, over the checkpoint's size on the disk
LOAD = """
import sys, threading, time
import torch
from grpo_engine.model import weights

def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, status("RssAnon"))
        time.sleep(0.0005)

before, whole = status("RssAnon"), status("VmHWM")
watcher = threading.Thread(target=watch)
watcher.start()
model = weights.load_model(sys.argv[1], dtype=torch.bfloat16)
done = True
watcher.join()
print(max(peak, status("RssAnon")) - before, status("VmHWM") - whole)
"""
console = Console(width=120)


def config_of(name: str, folder: Path, **changes: int):
    """transformers' configuration of a published model."""
    from transformers import AutoConfig

    (folder / "config.json").write_text(json.dumps(published(name) | changes), encoding="utf-8")
    return AutoConfig.from_pretrained(folder)


def parameters(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    table, same = Table("model", "ours", "transformers'", "without embedding and head"), True
    for name in PUBLISHED:
        config = config_of(name, folder)
        with torch.device("meta"):
            ours, theirs = Model(hf_config.read_config(folder)), AutoModelForCausalLM.from_config(config)
        count = sum(p.numel() for p in theirs.parameters())
        same &= ours.num_parameters == count
        table.add_row(name, f"{ours.num_parameters:,}", f"{count:,}", f"{ours.num_non_embedding:,}")
    console.print(table)
    return same


@torch.no_grad()
def logits(name: str, folder: Path) -> tuple[list[str], bool]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = config_of(name, folder, num_hidden_layers=2)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for p in theirs.parameters():
        if p.dim() == 1:  # norms and biases are random as well
            p.add_(0.1 * torch.randn(p.shape))
    theirs.save_pretrained(folder / "theirs")
    tokens = torch.randint(config.vocab_size, (sum(LENGTHS),))
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def answers(model) -> torch.Tensor:
        if isinstance(model, Model):
            return model.logits(model(tokens, packed_positions(cu_seqlens), Packed(cu_seqlens)))
        return torch.cat([model(t[None]).logits[0].float() for t in tokens.split(LENGTHS)])

    want = answers(theirs)
    ours = weights.load_model(folder / "theirs")
    difference = float((answers(ours) - want).abs().max())
    weights.save_checkpoint(ours, folder / "ours", max_shard_bytes=SHARD_BYTES)
    shards = len(list((folder / "ours").glob("*.safetensors")))
    again = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32).state_dict()
    same = all(torch.equal(again[key], value) for key, value in theirs.state_dict().items())
    del again, ours

    def relative(model) -> float:
        return float((answers(model) - want).norm() / want.norm())

    half = relative(weights.load_model(folder / "theirs", dtype=torch.bfloat16))
    cells = [name, f"{want.abs().max():.2f}", f"{difference:.1e}", f"{half:.2%}", f"{relative(theirs.bfloat16()):.2%}",
             f"{shards} shards, {'the same weights' if same else 'OTHER WEIGHTS'}"]  # fmt: skip
    return cells, difference <= FLOAT32_BOUND and half <= BFLOAT16_BOUND and same and shards > 1


def loading(folder: Path) -> bool:
    config_of(LOADED, folder)
    model = Model(hf_config.read_config(folder), torch.bfloat16).init_weights(0)
    weights.save_checkpoint(model, folder / "saved")
    del model
    size = sum(path.stat().st_size for path in (folder / "saved").glob("*.safetensors"))
    found = subprocess.run([sys.executable, "-c", LOAD, str(folder / "saved")], capture_output=True, text=True, check=True)
    own, whole = map(int, found.stdout.split())
    console.print(
        f"loading {LOADED} of {size / 1e6:.0f} MB in bfloat16: peak {own / size:.4f} of that in memory of its own, "
        f"{whole / size:.2f} with the pages of the mapped file, which the system can drop"
    )
    return own <= MEMORY_BOUND * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    good = []
    with tempfile.TemporaryDirectory() as folder:
        good.append(parameters(Path(folder)))
    table = Table("two layers of", "largest logit", "float32: difference", "bfloat16: ours", "transformers'", "saved")
    for name in WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            cells, right = logits(name, Path(folder))
        table.add_row(*cells)
        good.append(right)
    console.print(table)
    with tempfile.TemporaryDirectory() as folder:
        good.append(loading(Path(folder)))
    raise SystemExit(not all(good))


if __name__ == "__main__":
    main()
