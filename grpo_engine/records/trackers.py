"""A run's records, shown in TensorBoard, Weights & Biases or Trackio; each is optional and imported when asked for.

Records are the source and a tracker a copy of them: a run needs none, and can be exported at any time, again too.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from pathlib import Path

from grpo_engine.records import jsonl, records

TRACKERS = ("tensorboard", "wandb", "trackio")


def export(run_dir: Path | str, tracker: str, *, out: Path | str, project: str = "grpo_engine") -> int:
    """Copies the scalars of a run, complete or under way, into a tracker's own files.

    Args:
        run_dir: a run's folder.
        tracker: one of `TRACKERS`. wandb is written offline (`wandb sync` uploads it), trackio to its local folder.
        out: folder of the tracker's files; for trackio, which has one of its own, unused.
        project: name that wandb and trackio group runs under.

    Returns:
        How many steps were written.

    Raises:
        ValueError: no such tracker, it is not installed, or a malformed record.
        FileNotFoundError: no run there.
    """
    if tracker not in TRACKERS:
        raise ValueError(f"export: tracker must be one of {', '.join(TRACKERS)}, got {tracker!r}")
    run = records.read_run(run_dir, allow_incomplete=True)
    rows = list(scalars(run))
    name, config = Path(run_dir).resolve().name, run.header.get("config", {})
    try:
        library = importlib.import_module("torch.utils.tensorboard" if tracker == "tensorboard" else tracker)
    except ImportError as e:
        raise ValueError(f"export: {tracker} is not installed ({e}); pip install {tracker}") from e
    if tracker == "tensorboard":
        with library.SummaryWriter(str(Path(out) / name)) as writer:
            for step, values in rows:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)
        return len(rows)
    where = {"mode": "offline", "dir": str(out)} if tracker == "wandb" else {}
    if tracker == "wandb":
        Path(out).mkdir(parents=True, exist_ok=True)
    library.init(project=project, name=name, config=config, **where)
    try:
        for step, values in rows:
            library.log(values, step=step)
    finally:
        library.finish()
    return len(rows)


def scalars(run: records.Run) -> Iterator[tuple[int, dict[str, float]]]:
    """What a tracker is given.

    Args:
        run: as `records.read_run` gives it.

    Yields:
        (step, {name: number}), steps ascending: "train/loss" and the like, "eval/SET/MODE/loss", "seconds/PHASE". What
        was not measured, or is not finite, is left out.
    """
    rows: dict[int, dict[str, float]] = {}
    for record in run.steps:
        _add(rows, record.step, "train", jsonl.to_json(record))
    for result in run.evals:
        kept = {k: v for k, v in jsonl.to_json(result).items() if k in ("pass1", "loss", "stderr")}
        _add(rows, result.step, f"eval/{result.eval_set}/{result.mode}", kept)
    for timing in run.timings:
        row = rows.setdefault(timing.step, {})  # the last step has two records
        for phase, cost in timing.phase.items():
            row[f"seconds/{phase}"] = row.get(f"seconds/{phase}", 0.0) + cost.seconds
    yield from sorted(rows.items())


def _add(rows: dict[int, dict[str, float]], step: int, group: str, values: dict[str, object]) -> None:
    row = rows.setdefault(step, {})
    for key, value in values.items():
        if key in ("step", "schema") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            row[f"{group}/{key}"] = value
