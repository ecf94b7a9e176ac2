"""Files that are whole or not there: atomic writes, syncing of folders, and what tells one content from another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path


def cache_root() -> Path:
    """Where what can be made again is kept: $XDG_CACHE_HOME/grpo_engine, or ~/.cache/grpo_engine."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "grpo_engine"


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes bytes under a temporary name, fsyncs and renames: a reader finds the whole content, or what was there before.

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
    sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all: written under another name beside it, fsynced, renamed.

    Args:
        folder: absent, or empty; what it would hold is never mixed with other files. Its parents are made.

    Yields:
        The folder to write to, without folders in it.

    Raises:
        FileExistsError: the folder holds something.
        OSError: it cannot be written; nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: must be absent or an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def sync_tree(folder: Path) -> None:
    """Forces the files of a folder, then the folder itself, to the disk.

    Args:
        folder: without folders in it.
    """
    for path in sorted(folder.iterdir()):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """fsync of a folder (its names), or of a file (its content).

    Args:
        path: of either.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """A folder, made with those above it when absent.

    Args:
        path: of the folder.

    Returns:
        The path.

    Raises:
        NotADirectoryError: a file is there, or is a part of the path.
        OSError: it cannot be made.
    """
    path = Path(path)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"{path}: must be a folder, but {part} is a file")
    path.mkdir(parents=True, exist_ok=True)
    return path


_PIECE = 1 << 20
_WHOLE, _SAMPLES = 64, 64  # in pieces of a mebibyte


def fingerprint(*paths: str | os.PathLike[str], patterns: Sequence[str] = ("*",), sampled: bool = False) -> str:
    """What tells the content of files or folders from another: a SHA-256 of names, sizes and bytes.

    Args:
        paths: files, or folders, whose files are taken in the order of their names.
        patterns: which files of a folder count.
        sampled: of a file above 64 MiB read 64 MiB: 64 pieces of one mebibyte, evenly spaced, both ends among them. 30 GB
            of weights in eight files then cost half a GB of reading. An update of all weights shows; a change of a few
            bytes between the pieces does not.

    Returns:
        16 hexadecimal digits.

    Raises:
        FileNotFoundError: nothing is there.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        inside = (
            sorted(p for p in path.rglob("*") if p.is_file() and any(map(p.match, patterns))) if path.is_dir() else [path]
        )
        for file in inside:
            name = file.relative_to(path) if path.is_dir() else ""  # a file may be renamed
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            _digest_file(digest, file, sampled)
    return digest.hexdigest()[:16]


def _digest_file(digest: hashlib._Hash, file: Path, sampled: bool) -> None:
    size = file.stat().st_size
    with file.open("rb") as data:
        if sampled and size > _WHOLE * _PIECE:
            for i in range(_SAMPLES):
                data.seek((size - _PIECE) * i // (_SAMPLES - 1))
                digest.update(data.read(_PIECE))
        else:
            while block := data.read(_PIECE):
                digest.update(block)
