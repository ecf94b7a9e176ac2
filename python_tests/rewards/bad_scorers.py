"""Scorers that misbehave, for the tests of the pool; workers import them by name."""

import ctypes
import os
import sys
import time


def good(response, problem):
    return float(response == problem.answer)


def hang(response, problem):
    if response == "hang":
        while True:
            time.sleep(1)
    return 1.0


def hang_in_c(response, problem):
    import re

    re.match(r"(a+)+$", "a" * 40 + "b")  # decades, with the interpreter's lock held
    return 1.0


def leave(response, problem):
    if response.startswith("exit"):
        os._exit(int(response.removeprefix("exit")))
    return 1.0


def segfault(response, problem):
    if response == "segfault":
        ctypes.string_at(0)
    return 1.0


def memory(response, problem):
    return float(len(bytearray(1 << 36)))


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(lambda: one)


def unpicklable(response, problem):
    raise Unpicklable(1, 2)


def leave_politely(response, problem):
    sys.exit(3)


def no_reward(response, problem):
    return {"none": None, "nan": float("nan"), "two": 2, "text": "1"}[response]


def torch_is_imported(response, problem):
    return float("torch" in sys.modules)


def main_is_the_callers(response, problem):
    return float(hasattr(sys.modules["__main__"], "__file__"))


def pid(response, problem):
    """The worker's process id, made a number in [0, 1]."""
    return os.getpid() / (1 << 23)
