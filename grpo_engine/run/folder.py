"""The folder of a run: which run it is, how far it came, and the files that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from grpo_engine.config import RunConfig
from grpo_engine.model.decoder import Model
from grpo_engine.model.hub import FILES
from grpo_engine.records import jsonl, records
from grpo_engine.run.counters import Counters
from grpo_engine.system import device, files, locks
from grpo_engine.tasks.rows import find_files
from grpo_engine.train import checkpoint

RECORD_FILES = (records.STEPS_FILE, records.EVALS_FILE, records.TIMINGS_FILE, records.ORDER_FILE)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's identity, as its folder and the configuration agree on it."""

    path: Path
    config: RunConfig  # its device is resolved
    run_id: str
    revision: str | None  # of the weights that it was begun with, where they have one
    finished: bool

    @classmethod
    def of(cls, config: RunConfig, path: Path) -> RunFolder:
        """The run of a configuration in a folder, which need not exist.

        Raises:
            ValueError: another run is there, or one that was begun on a device that is not there, or on other data.
        """
        finished = (path / records.SUMMARY_FILE).exists()
        begun = jsonl.read_json(path / records.RUN_FILE) if (path / records.RUN_FILE).exists() else None
        # a device decides the last bits, so it is part of what a run is: the id is that of the resolved configuration
        config = config.model_copy(update={"device": _device(path, config.device, begun, finished)})
        run_id = records.run_id(config.model_dump(mode="json"))
        if begun is not None:
            _refuse_another_run(path, begun, run_id, config)
            if not finished:
                _refuse_other_data(path, begun.get("data", {}), config)
        # a run goes on with the weights that it began with
        revision = None if begun is None else begun["model"].get("revision")
        return cls(path=path, config=config, run_id=run_id, revision=revision, finished=finished)

    @contextlib.contextmanager
    def held(self, *, wait_s: float = 0.0) -> Iterator[None]:
        """Makes the folder and keeps every other process from writing to it.

        Raises:
            Locked: another process writes to it, and has for wait_s seconds.
        """
        files.make_folder(self.path)
        message = f"{self.path}: another process writes to this run"
        with locks.locked(self.path / locks.LOCK_FILE, message, wait_s=wait_s):
            yield

    def checkpoint(self) -> checkpoint.State | None:
        """The newest checkpoint that is whole, or None where the run is to begin."""
        return checkpoint.load(self.path, config_hash=self.run_id)

    def begin(self, header: Mapping[str, Any]) -> None:
        """Writes run.json, before the first step.

        Args:
            header: what it says beside what the folder knows.
        """
        c = self.config
        identity = {"run_id": self.run_id, "method": c.method, "config": c.model_dump(mode="json"), "data": fingerprints(c)}
        jsonl.write_json_atomic(self.path / records.RUN_FILE, {**identity, **header})

    def finish(self, counters: Counters) -> None:
        """Writes summary.json: the run is complete."""
        summary = {
            "run_id": self.run_id,
            "steps": self.config.steps,
            "trained_tokens": counters.trained_tokens,
            "compute_ledger": counters.flops,
        }
        jsonl.write_json_atomic(self.path / records.SUMMARY_FILE, summary)


class RecordFiles:
    """The open record files of a run, and the checkpoints that note their lengths."""

    def __init__(self, folder: RunFolder, lengths: Mapping[str, int] | None) -> None:
        """Opens the files and cuts them back.

        Args:
            folder: of the run.
            lengths: of each file when the checkpoint was taken; None: the run begins.
        """
        self._folder = folder
        self.steps, self.evals, self.timings, self.order = self._writers = tuple(
            jsonl.JsonlWriter(folder.path / name, truncate_to=lengths[name] if lengths else 0) for name in RECORD_FILES
        )

    def __enter__(self) -> RecordFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for writer in self._writers:
            writer.close()

    def checkpoint(
        self, counters: Counters, model: Model, optimizer: torch.optim.Optimizer, tokenizer_folder: Path | None
    ) -> None:
        """Saves all that a resumed run goes on from."""
        for writer in self._writers:
            writer.sync()
        checkpoint.save(
            self._folder.path,
            model=model,
            optimizer=optimizer,
            step=counters.step,
            config_hash=self._folder.run_id,
            lengths={w.path.name: w.num_bytes for w in self._writers},
            meta={"counters": dataclasses.asdict(counters)},
            tokenizer_folder=tokenizer_folder,
        )

    def read_timings(self) -> list[records.TimingRecord]:
        """All timings of the run, those of earlier processes included."""
        found = jsonl.read_jsonl(self.timings.path).records
        return [jsonl.from_json(records.TimingRecord, o) for o in found]


def fingerprints(config: RunConfig) -> dict[str, str]:
    """What tells the data of a run from other data under the same paths.

    Args:
        config: of the run.

    Returns:
        The setting that names a path -> the fingerprint of what is there. Data files are read whole; of a model's large
        files pieces are (`files.fingerprint`). A model of the hub has a revision instead, and one of the embedded
        ladder is a function of its settings. What a task of the user's own names need not be a path.
    """
    task = {"task.train": config.task.train, **{f"task.evals.{name}": path for name, path in config.task.evals.items()}}
    found = {}
    for name, source in task.items():
        if source is None:
            continue
        with contextlib.suppress(FileNotFoundError, ValueError):  # a task of the user's own may name what it likes
            found[name] = files.fingerprint(*find_files(source))
    if config.model.path is not None and Path(config.model.path).exists():
        found["model.path"] = files.fingerprint(config.model.path, patterns=FILES, sampled=True)
    return found


def _refuse_other_data(path: Path, begun: Mapping[str, str], config: RunConfig) -> None:
    now = fingerprints(config)
    for name, before in begun.items():
        if now.get(name) != before:
            where = config.model.path if name == "model.path" else config.task.evals.get(name.removeprefix("task.evals."))
            where = where or config.task.train
            what = "has changed since the run began" if name in now else "is not there any more"
            raise ValueError(
                f"{path}: {name}={where} {what} ({before} there, {now.get(name, 'nothing')} here): put back what was "
                "there, or begin anew in another folder"
            )


def _device(path: Path, asked: str, begun: Mapping[str, Any] | None, finished: bool) -> str:
    """Where to compute: a run stays where it was begun, unless the configuration says otherwise (and is refused)."""
    if begun is None:
        return device.resolve(asked)
    before = begun["config"].get("device", "cpu")
    if asked not in ("auto", before):
        return asked
    if finished:
        return before
    try:
        return device.resolve(before)
    except ValueError as e:
        raise ValueError(
            f"{path} was begun on {before}, and another device would change its bits: go on where there is one, "
            f"or begin anew in another folder ({e})"
        ) from None


def _refuse_another_run(path: Path, begun: Mapping[str, Any], run_id: str, config: RunConfig) -> None:
    if begun["run_id"] != run_id:
        differing = _differences(begun["config"], config.model_dump(mode="json"))
        raise ValueError(f"{path} holds another run ({begun['run_id']}); it differs in {', '.join(differing)}")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            names += _differences(x, y, f"{prefix}{key}.")
        elif x != y:
            names.append(f"{prefix}{key} ({x!r} there, {y!r} here)")
    return names
