"""A user's own code, named as "module:name" in a configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

TARGET = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


def is_target(name: str) -> bool:
    """Whether a name reads "module:name", modules in packages with dots."""
    return re.fullmatch(TARGET, name) is not None


def load(target: str, argument: str) -> Callable[..., Any]:
    """The function or class behind a target.

    Args:
        target: "module:name"; the module must be importable wherever the run is: its folder in PYTHONPATH, say.
        argument: what named it, for the error.

    Returns:
        Something that can be called.

    Raises:
        ValueError: no such form, no such module, no such name in it, or it cannot be called; the argument is named. What
            the module itself raises while it is imported goes through, but for an ImportError.
    """
    if not is_target(target):
        raise ValueError(f"{argument}: wanted 'module:name', got {target!r}")
    module, name = target.split(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as e:
        raise ValueError(f"{argument}={target}: {e} (is its folder in PYTHONPATH?)") from e
    except AttributeError:
        raise ValueError(f"{argument}={target}: module {module} has no {name}") from None
    if not callable(found):
        raise ValueError(f"{argument}={target}: wanted something to call, got {found!r}")
    return found
