"""Files that are whole or not there: atomic writes, and syncing of folders."""

from __future__ import annotations

import os
import tempfile
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
