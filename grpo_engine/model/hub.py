"""Where a model's files lie: in a folder of the user's, or in Hugging Face's cache under the name of a model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from grpo_engine.model.hf_config import CONFIG_FILE, INDEX_FILE, TOKENIZER_FILES

FILES = [CONFIG_FILE, INDEX_FILE, "*.safetensors", *TOKENIZER_FILES]  # all that is read of a model
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files."""

    folder: Path
    revision: str | None  # commit of the hub's repository; None: a folder, which has none


def find_model(path: str, *, revision: str | None = None) -> Snapshot:
    """The files of a model, fetched if they have to be.

    Args:
        path: a folder, or else the name of a model on the hub, "Qwen/Qwen2.5-0.5B", if need be with a branch, a tag or a
            commit: "Qwen/Qwen2.5-0.5B@main". Its files are looked for in huggingface_hub's cache and fetched where the
            hub can be reached (HF_HOME, HF_HUB_OFFLINE and HF_TOKEN are heeded).
        revision: the commit to take, of a run that goes on; it comes before the name's.

    Returns:
        The folder, and which commit it holds.

    Raises:
        FileNotFoundError: neither a folder, nor in the cache, nor to be fetched; the message says which was tried.
    """
    if Path(path).is_dir():
        return Snapshot(Path(path), None)
    name = _NAME.fullmatch(path)
    if name is None:
        raise FileNotFoundError(f"model.path={path}: no such folder, and no name on a hub (OWNER/NAME)")
    from huggingface_hub import constants, snapshot_download

    try:
        folder = Path(snapshot_download(name["repo"], revision=revision or name["revision"], allow_patterns=FILES))
    except (OSError, ValueError) as error:  # what the hub and its client raise
        tried = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"from {constants.ENDPOINT}"
        reason = str(error).strip().partition("\n")[0]
        at = f" at {revision}" if revision else ""
        raise FileNotFoundError(
            f"model.path={path}: no such folder, not in the cache {constants.HF_HUB_CACHE}{at}, and not to be fetched "
            f"({tried}): {reason}"
        ) from error
    return Snapshot(folder, folder.name)


def find_config(path: str | os.PathLike[str]) -> Path | None:
    """The folder with a model's config.json, if it is on this machine; nothing is fetched.

    Args:
        path: see `find_model`.

    Returns:
        The folder, or None.
    """
    if (Path(path) / CONFIG_FILE).is_file():
        return Path(path)
    name = _NAME.fullmatch(os.fspath(path))
    if name is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name["repo"], CONFIG_FILE, revision=name["revision"])
    return Path(file).parent if isinstance(file, str) else None
