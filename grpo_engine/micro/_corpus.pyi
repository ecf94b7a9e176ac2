# For type checkers: the compiled generator, whose names are bound in csrc/bindings/corpus.cpp.
from typing import Any

def __getattr__(name: str) -> Any: ...
