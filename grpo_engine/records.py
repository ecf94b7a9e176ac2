"""What a run leaves behind: typed records, one JSON object a line, and nothing else.

A run directory holds

    run.json        what was run: resolved configuration, commit, versions, hardware, model, method
    steps.jsonl     one `StepRecord` a line: deterministic, bit-identical after a kill and a resume
    evals.jsonl     one `EvalRecord` a line: deterministic as well
    timings.jsonl   one `TimingRecord` a line: wall-clock, different in every run; only cost figures read it
    order.txt       uid of every training prompt in the order they are seen, one a line; P lines are a step
    checkpoint/     written by `grpo_engine.checkpoint`
    summary.json    written last: a run with a summary is complete

Every object carries `"schema": 2`; records of schema 1, which lack `EvalRecord.right`, are read too. A value
that was not measured is `null`. JSON has no NaN and no infinity, so a value that is not finite is written as `null`
*and named*, with what it was, under the key `"non_finite"` of the same object:
`{"loss": null, "non_finite": {"loss": "nan"}}`. An absent number and a broken one never look alike.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 2
READABLE = (1, 2)  # schemas that are read; a field that the older lacks has a default
RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
EVALS_FILE = "evals.jsonl"
TIMINGS_FILE = "timings.jsonl"
ORDER_FILE = "order.txt"
SUMMARY_FILE = "summary.json"
CELL_FILE = "cell.json"  # written by a study beside the run's own files: which cell this run is

PHASES = (
    "prefill",
    "decode",
    "reference",
    "forward",
    "backward",
    "optimizer",
    "reward",
    "evaluation",
    "checkpoint",
)
METHODS = ("grpo", "pretrain")


# ------------------------------------------------------------------------------------------ records


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimisation step. Everything here is a function of the configuration alone, never of the clock.

    Counters whose comment says "so far" include this step. `None` means that the quantity does not exist in
    this run (no KL term, or a pretraining step, which has no reward), never that it was zero.
    """

    step: int  # 1 is the first step
    prompts_seen: int  # D: prompts drawn so far, repeats included; 0 for pretraining
    unique_prompts: int  # different prompts drawn so far; prompts_seen / unique_prompts is the reuse so far
    trained_tokens: int  # T: prompt and response tokens of the answers trained on, so far; each answer counts its prompt
    compute_6nt: float  # FLOPs so far, 6 x non-embedding parameters x trained_tokens
    compute_ledger: float  # FLOPs so far, all phases but evaluation summed
    reward_mean: float | None = None  # over all answers of the step
    reward_std: float | None = None  # over all answers of the step, divided by n - 1
    reward_failures: int | None = None  # answers whose verifier timed out, crashed or raised (scored 0)
    groups: int | None = None  # prompts of the step
    equal_groups: int | None = None  # groups whose answers all got one reward: they carry no gradient
    response_len_mean: float | None = None  # tokens
    finished_share: float | None = None  # answers that ended by themselves, not at the length limit
    prompt_tokens: int | None = None  # of this step, counted once an answer
    response_tokens: int | None = None  # of this step
    loss: float | None = None  # mean over the step's minibatches
    kl: float | None = None  # estimate of the KL to the reference policy; None without a reference
    entropy: float | None = None  # nats a token, mean over response tokens as they were sampled
    clip_low_share: float | None = None  # response tokens whose ratio was clipped from below
    clip_high_share: float | None = None
    ratio_max: float | None = None
    grad_norm: float | None = None  # before clipping, mean over minibatches
    lr: float | None = None
    logprob_mismatch_max: float | None = None  # max |sampler's - trainer's log-prob|; 0.0 if batch-invariant


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """One evaluation of one set in one mode. `loss` is 1 - `pass1`."""

    step: int  # 0 is the model as it came
    prompts_seen: int
    unique_prompts: int
    trained_tokens: int
    compute_6nt: float
    compute_ledger: float
    eval_set: str
    in_domain: bool
    mode: str  # "sample" or "greedy"
    temperature: float  # 0.0 for greedy
    num_problems: int
    num_samples: int  # answers to each problem
    pass1: float  # mean over problems of the share of right answers
    loss: float
    stderr: float | None  # of pass1, over problems; None for a single problem
    by_grade: dict[str, dict[str, float]] | None = None  # {grade: {"pass1": float, "n": int}}
    right: list[int] | None = None  # right answers to each problem, in the set's order; None where rewards are not 0 or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseCost:
    """What one phase of one step took. `tokens` and `flops` are None where the phase has none (reward)."""

    seconds: float
    tokens: int | None = None
    flops: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingRecord:
    """The cost of one step by phase; phases that did not happen are absent. Names are those of `PHASES`.

    The first record of a process includes what came before its first step; what comes after a record, such as a
    checkpoint, is in the next one, and at the end of the run in one more record of the last step.
    """

    step: int
    phase: dict[str, PhaseCost]
    seconds: float | None = None  # wall-clock since the record before, booked or not; None in records of old versions


_Record = TypeVar("_Record")


def to_json(record: Any) -> dict[str, Any]:
    """A record, or a mapping, as the JSON object that is written: schema first, non-finite numbers named.

    Args:
        record: a dataclass instance or a mapping of JSON-like values; nested ones are walked. Paths become text,
            tuples become lists, and anything with an `item()` method (a one-element tensor) becomes its number.

    Returns:
        A dict that starts with `"schema"`. A NaN or an infinity is `None`, and `"non_finite"` maps its dotted
        name to "nan", "inf" or "-inf".

    Raises:
        TypeError: a value that has no JSON form; the message names its place.
    """
    non_finite: dict[str, str] = {}
    body = _plain(record, "", non_finite)
    if not isinstance(body, dict):
        raise TypeError(f"to_json: a record must be a dataclass or a mapping, got {type(record).__name__}")
    body.pop("schema", None)
    out = {"schema": SCHEMA, **body}
    if non_finite:
        out["non_finite"] = non_finite
    return out


def _plain(value: Any, where: str, non_finite: dict[str, str]) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        non_finite[where] = "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {
            str(k): _plain(v, f"{where}.{k}" if where else str(k), non_finite) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", non_finite) for i, v in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "item", None)):
        return _plain(value.item(), where, non_finite)
    raise TypeError(f"to_json: {where or 'the record'} is a {type(value).__name__}, which has no JSON form")


def from_json(cls: type[_Record], obj: Mapping[str, Any], *, where: str = "record") -> _Record:
    """A typed record from a JSON object that was read.

    Args:
        cls: `StepRecord`, `EvalRecord` or `TimingRecord`.
        obj: the object; `schema` and `non_finite` are checked and left out.
        where: file and line, for messages.

    Returns:
        An instance of `cls`. Fields with a default may be absent.

    Raises:
        ValueError: another schema number, a missing field or one that `cls` does not have.
        TypeError: a value of the wrong type (an integer is accepted where a float is wanted).
    """
    _check_schema(obj, where)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {k: v for k, v in obj.items() if k not in ("schema", "non_finite")}
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: {cls.__name__} has no field {', '.join(unknown)}")
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [n for n in required if n not in values]:
        raise ValueError(f"{where}: {cls.__name__} lacks {', '.join(missing)}")
    nulled = obj.get("non_finite", {})
    hints = _hints(cls)
    for name, value in values.items():
        if value is None and name in nulled:
            values[name] = float(nulled[name])
        elif not _is_a(value, hints[name]):
            raise TypeError(f"{where}: {cls.__name__}.{name} must be {fields[name].type}, got {value!r}")
        else:
            values[name] = _made(value, hints[name])
    return cls(**values)


def _made(value: Any, hint: Any) -> Any:
    """A mapping of objects as the dataclasses that the hint names."""
    kind = get_args(hint)[-1] if get_origin(hint) is dict else None
    return {k: kind(**v) for k, v in value.items()} if dataclasses.is_dataclass(kind) else value


def _check_schema(obj: Mapping[str, Any], where: str) -> None:
    if obj.get("schema") not in READABLE:
        raise ValueError(f"{where}: schema must be one of {READABLE}, got {obj.get('schema')!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_is_a(value, h) for h in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


# ------------------------------------------------------------------------------------------ writing


class JsonlWriter:
    """Appends records to a file, one line each, flushed to the operating system after every line.

    A process that is killed loses nothing that `write` returned from; a machine that loses power may lose lines
    written after the last `sync`. A checkpoint stores `num_bytes` after a `sync`; opening with `truncate_to` that
    number puts the file back to where the checkpoint was taken, so a resumed run repeats the lost lines exactly.
    """

    def __init__(self, path: str | os.PathLike[str], *, truncate_to: int | None = None) -> None:
        """Opens, and creates when absent, the file.

        Args:
            path: the file; its folder must exist.
            truncate_to: length in bytes to cut the file to before appending; None appends at the end; 0 starts afresh.

        Raises:
            ValueError: the file is shorter than `truncate_to`, so records that a checkpoint counted on are gone;
                or it does not end a line there.
        """
        self.path = Path(path)
        self._file = open(self.path, "ab")
        size = self._file.tell()
        if truncate_to is not None:
            if not 0 <= truncate_to <= size:
                self._file.close()
                raise ValueError(
                    f"{self.path}: truncate_to must be in 0..{size} (the file's length), got {truncate_to}: "
                    "records that the checkpoint counted on are missing"
                )
            with open(self.path, "rb") as read:
                read.seek(max(truncate_to - 1, 0))
                if truncate_to > 0 and read.read(1) != b"\n":
                    self._file.close()
                    raise ValueError(f"{self.path}: byte {truncate_to} does not end a record")
            self._file.truncate(truncate_to)
            self._file.seek(0, os.SEEK_END)

    @property
    def num_bytes(self) -> int:
        """Length of the file in bytes, all written lines included."""
        return self._file.tell()

    def write(self, record: Any) -> None:
        """Appends one record (see `to_json`) and flushes it.

        Args:
            record: a dataclass instance or a mapping.

        Raises:
            TypeError: a value without a JSON form; the file is then unchanged.
        """
        line = json.dumps(to_json(record), allow_nan=False, separators=(",", ":")) + "\n"
        self._file.write(line.encode())
        self._file.flush()

    def sync(self) -> None:
        """Forces what was written to the disk (fsync)."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes a JSON file so that a reader sees the old content or the new, never a part.

    Written to a temporary name in the same folder, fsynced, renamed; then the folder is fsynced.

    Args:
        path: the file; its folder must exist.
        obj: a dataclass instance or a mapping (see `to_json`; `schema` is added).

    Raises:
        TypeError: a value without a JSON form.
        OSError: the folder is missing or not writable; no temporary file is left behind.
    """
    write_bytes_atomic(path, (json.dumps(to_json(obj), allow_nan=False, indent=1) + "\n").encode())


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes bytes under a temporary name, fsyncs and renames; see `write_json_atomic`.

    Args:
        path: the file; its folder must exist.
        data: the whole content.

    Raises:
        OSError: the folder is missing or not writable; no temporary file is left behind.
    """
    path = Path(path)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files private; a record is not a secret
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def run_id(config: Mapping[str, Any]) -> str:
    """The name of a run: the first 12 hexadecimal digits of the SHA-256 of its resolved configuration.

    Args:
        config: the resolved configuration as JSON-like values; the order of keys does not matter.

    Returns:
        12 lower-case hexadecimal digits.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def collect_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a result; None for one that is not installed.

    Returns:
        {"python": ..., "grpo_engine": ..., "torch": ..., ...}
    """
    from importlib import metadata

    names = ("grpo_engine", "torch", "transformers", "tokenizers", "safetensors", "math-verify", "pyarrow")
    out: dict[str, str | None] = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = None
    return out


def collect_source(package: Path = Path(__file__).parent) -> dict[str, str | None]:
    """Which code a run was made by.

    Args:
        package: folder of the package.

    Returns:
        {"commit": of the repository that the package lies in, with "-dirty" where files differ from it; None for an
        installed wheel, "wheel": SHA-256 of an installed wheel's list of files and hashes (RECORD); None in a repository}.
    """
    from importlib import metadata

    if (package.parent / ".git").exists():
        git = ["git", "-C", str(package.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found = None  # no git here
        return {"commit": found, "wheel": None}
    try:
        record = metadata.distribution("grpo_engine").read_text("RECORD")
    except metadata.PackageNotFoundError:
        record = None
    return {"commit": None, "wheel": None if record is None else hashlib.sha256(record.encode()).hexdigest()}


def collect_hardware() -> dict[str, Any]:
    """What the run is on: CPU, its vector instructions, cores, memory, threads, GPUs.

    Returns:
        {"platform", "cpu", "isa": list, "cores", "memory_bytes", "threads", "gpus": list}; None where the system
        does not say. `threads` and `gpus` are those of torch if it is loaded already, None if not;
        a study's job may get more or fewer threads later.
    """
    cpu: str | None = platform.processor() or None
    flags: set[str] = set()
    memory: int | None = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                cpu = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        pass  # not Linux: the fields stay None
    torch = sys.modules.get("torch")
    return {
        "platform": platform.platform(),
        "cpu": cpu,
        "isa": sorted(flags & {"avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "asimd"}),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else None,
    }


# ------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonlFile:
    """What a .jsonl file held. `torn` describes a last line that was cut short, when one was left out."""

    records: list[dict[str, Any]]
    torn: str | None = None


def read_jsonl(path: str | os.PathLike[str], *, allow_torn: bool = False) -> JsonlFile:
    """Reads a file of JSON objects, one a line.

    Args:
        path: the file.
        allow_torn: whether a last line that was cut short by a kill is left out and reported in `torn`; only right
            for a run that is not complete.

    Returns:
        The objects in order, and the report on a torn last line.

    Raises:
        ValueError: a line that is not a JSON object; the message holds file and line number.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    data = path.read_bytes()
    lines = data.split(b"\n")
    ends_clean = lines[-1] == b""
    if ends_clean:
        lines.pop()
    out: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        last = number == len(lines)
        problem = None
        if last and not ends_clean:
            problem = "is cut short (no line end)"
        else:
            try:
                obj = json.loads(line)
                if not isinstance(obj, dict):
                    problem = f"is not a JSON object: {line[:60]!r}"
            except ValueError as error:  # json and utf-8 errors alike
                problem = f"is not JSON ({error}): {line[:60]!r}"
        if problem is None:
            out.append(obj)
            continue
        message = f"{path}:{number}: the record {problem}"
        if last and not ends_clean and allow_torn:
            return JsonlFile(records=out, torn=message)
        raise ValueError(message)
    return JsonlFile(records=out)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one JSON object, of whatever schema.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        ValueError: not JSON, or not an object; the message names the file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        obj = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(obj, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(obj).__name__}")
    return obj


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one JSON object and checks its schema number.

    Args:
        path: the file.

    Returns:
        The object, `schema` included.

    Raises:
        ValueError: not a JSON object, or another schema; the message names the file.
        FileNotFoundError: no such file.
    """
    obj = read_object(path)
    _check_schema(obj, str(path))
    return obj


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run directory, read. `notes` says what was left out (torn last lines of a run that is under way)."""

    path: Path
    header: dict[str, Any]
    cell: dict[str, Any] | None  # cell.json, when a study made this run
    steps: list[StepRecord]
    evals: list[EvalRecord]
    timings: list[TimingRecord]
    summary: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the run reached its end: a summary, and its last step among the records."""
        return self.summary is not None


def is_complete(run_dir: str | os.PathLike[str]) -> bool:
    """Whether the directory holds a run that reached its end (`summary.json`, which is written last).

    Args:
        run_dir: a run directory; it need not exist.

    Returns:
        True or False.
    """
    return (Path(run_dir) / SUMMARY_FILE).is_file() and (Path(run_dir) / RUN_FILE).is_file()


def read_run(run_dir: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Run:
    """Reads a run directory and checks that its parts agree.

    Args:
        run_dir: the directory.
        allow_incomplete: whether a run without `summary.json` is read as far as it got.

    Returns:
        The run. Of a run that is not complete, a torn last line is left out and named in `notes`.

    Raises:
        FileNotFoundError: `run.json`, or a file that a complete run must have, is missing.
        ValueError: the run is not complete, a record is malformed, or steps.jsonl does not hold the last step.
    """
    path = Path(run_dir)
    if not (path / RUN_FILE).is_file():
        raise FileNotFoundError(f"{path}: no {RUN_FILE}, so this is not a run directory")
    header = read_json(path / RUN_FILE)
    summary = read_json(path / SUMMARY_FILE) if (path / SUMMARY_FILE).is_file() else None
    if summary is None and not allow_incomplete:
        raise ValueError(f"{path}: the run is not complete (no {SUMMARY_FILE})")
    notes: list[str] = []

    def load(name: str, cls: type[_Record]) -> list[_Record]:
        file = path / name
        if summary is None and not file.is_file():
            return []
        read = read_jsonl(file, allow_torn=summary is None)
        if read.torn:
            notes.append(read.torn)
        return [from_json(cls, o, where=f"{file}:{n}") for n, o in enumerate(read.records, start=1)]

    run = Run(
        path=path,
        header=header,
        cell=read_json(path / CELL_FILE) if (path / CELL_FILE).is_file() else None,
        steps=load(STEPS_FILE, StepRecord),
        evals=load(EVALS_FILE, EvalRecord),
        timings=load(TIMINGS_FILE, TimingRecord),
        summary=summary,
        notes=notes,
    )
    for name, rows in ((STEPS_FILE, run.steps), (TIMINGS_FILE, run.timings)):
        seen = [r.step for r in rows]
        if seen != sorted(seen) or (name == STEPS_FILE and len(seen) != len(set(seen))):
            raise ValueError(f"{path / name}: steps must rise, got {seen[:20]}")
    if summary is not None and summary.get("steps", 0) > 0:
        last = run.steps[-1].step if run.steps else 0
        if last != summary["steps"]:
            raise ValueError(
                f"{path / STEPS_FILE}: the last step must be {summary['steps']} (summary.json), got {last}"
            )
    return run


# ------------------------------------------------------------------------------------------ tables

_TABLE = (
    ("study", "string"),
    ("cell", "string"),
    ("run_id", "string"),
    ("method", "string"),
    ("kind", "string"),
    ("size", "string"),
    ("params_non_embedding", "int64"),
    ("params_nominal", "float64"),
    ("seed", "int64"),
    ("group_size", "int64"),
    ("tau", "float64"),
    ("step", "int64"),
    ("prompts_seen", "int64"),
    ("unique_prompts", "int64"),
    ("trained_tokens", "int64"),
    ("compute_6nt", "float64"),
    ("compute_ledger", "float64"),
    ("eval_set", "string"),
    ("in_domain", "bool_"),
    ("mode", "string"),
    ("temperature", "float64"),
    ("num_problems", "int64"),
    ("num_samples", "int64"),
    ("pass1", "float64"),
    ("loss", "float64"),
    ("stderr", "float64"),
)
TABLE_COLUMNS = tuple(name for name, _ in _TABLE)  # those of one value; right comes after them


def table_schema() -> pyarrow.Schema:
    """The Arrow schema of `runs.parquet`: one row an evaluation record, `TABLE_COLUMNS` in order and right.

    Returns:
        A pyarrow schema whose metadata holds the record schema number under b"grpo_engine_schema".
    """
    import pyarrow as pa

    fields = [pa.field(name, getattr(pa, kind)()) for name, kind in _TABLE]
    fields.append(pa.field("right", pa.list_(pa.int32())))
    return pa.schema(fields, metadata={b"grpo_engine_schema": str(SCHEMA).encode()})


def runs_table(
    run_dirs: Iterable[str | os.PathLike[str]] | Sequence[Run], *, allow_incomplete: bool = False
) -> pyarrow.Table:
    """All evaluations of several runs as one long table.

    Args:
        run_dirs: run directories, or runs that were read already.
        allow_incomplete: whether runs without a summary take part with what they have.

    Returns:
        A table with `table_schema()`, one row an evaluation record. `study`, `cell`, `kind`, `size` and `tau`
        come from the study's `cell.json`; for a run outside a study `study` is null, `cell` is the folder's name,
        kind and size are those of `run.json`, and `tau` is prompts seen over unique prompts at the end.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `read_run`.
        KeyError: `run.json` lacks a part of its description; the message names the file.
    """
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [] for name in table_schema().names}
    for item in run_dirs:
        run = item if isinstance(item, Run) else read_run(item, allow_incomplete=allow_incomplete)
        try:
            model, config = run.header["model"], run.header["config"]
            fixed = {
                "study": (run.cell or {}).get("study"),
                "cell": (run.cell or {}).get("cell", run.path.name),
                "run_id": run.header["run_id"],
                "method": run.header["method"],
                "kind": (run.cell or {}).get("kind", model["kind"]),
                "size": (run.cell or {}).get("size", model["size"]),
                "params_non_embedding": model["params_non_embedding"],
                "params_nominal": model.get("params_nominal"),
                "seed": config.get("seed"),
                "group_size": (config.get("batch") or {}).get("group_size"),
                "tau": (run.cell or {}).get("tau", _reuse(run)),
            }
        except KeyError as error:
            raise KeyError(f"{run.path / RUN_FILE}: no {error.args[0]!r}") from None
        for record in run.evals:
            for name, column in columns.items():
                column.append(fixed[name] if name in fixed else getattr(record, name))
    return pa.table(columns, schema=table_schema())


def _reuse(run: Run) -> float | None:
    last = run.steps[-1] if run.steps else None
    return last.prompts_seen / last.unique_prompts if last and last.unique_prompts else None
