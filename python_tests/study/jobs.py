"""What the forked processes of test_run.py do: code that comes as text. Another preload too, by JOBS_PRELOAD."""

import os


def preload():
    exec(os.environ.get("JOBS_PRELOAD", ""))


def main(arguments):
    exec(arguments[0], {"__name__": "job"})
    return 0
