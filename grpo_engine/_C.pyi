# For type checkers: the compiled extension, whose names are bound in csrc/bindings.
from typing import Any

def __getattr__(name: str) -> Any: ...
