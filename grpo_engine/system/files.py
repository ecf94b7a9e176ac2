"""Files that are whole or not there: atomic writes, and syncing of folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path


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
