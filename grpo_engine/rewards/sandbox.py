"""The processes that run a model's program and judge it: locked in, they run it, and report.

Started by `grpo_engine.rewards.code` as a script of its own, so it imports the standard library alone. A *player* runs
the program and calls its functions; a *judge*, whose memory the player can neither read nor write, runs the tests. What
passes between them is plain data (`encode`), so an object that equals everything, a patched `assert` or a search for
the judge's token has nothing to work on. What is set up around both, each only where the kernel allows:

    network       a network namespace of its own, without an interface
    processes     a process namespace of its own: nothing else can be signalled, and everything ends with it
    files         Landlock: written, made or removed only inside its own temporary folder; read only there and where
                  Python and the system's libraries are
    limits        CPU time, memory, file size, open files, number of processes, no core dump
    privileges    none can be gained, capabilities are dropped; a superuser becomes nobody where nobody can read
                  this Python, and otherwise nobody in name only, so that the limit on processes binds

What it does not do: the kernel itself is trusted, names and sizes of files outside can be asked for, and functions are
tested by plain values alone: numbers, text, bytes, None, and lists, tuples, sets and dicts of them.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import numbers
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import IO, Any

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NOBODY = 65534
SYS_LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self: the same on every architecture
LANDLOCK_EXECUTE, LANDLOCK_WRITE, LANDLOCK_READ = 1 << 0, 1 << 1, 3 << 2  # read: files and folders
# remove_dir 4, remove_file 5, make_* 6 to 12; refer (rename across folders) 13 since ABI 2; truncate 14 since ABI 3
LANDLOCK_CHANGES = LANDLOCK_WRITE | sum(1 << bit for bit in range(4, 13))
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")
OPEN_FILES, PROCESSES = 64, 32
MAX_MESSAGE_CHARS = 16 << 20  # of a function's value, encoded

_libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int, folder: str, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Reads {"program", "tests", "token"} from the folder's job.json; the token goes to stdout if all tests pass.

    Args:
        parent: process id of the caller; with its death this process dies.
        folder: the temporary folder; becomes the working directory.
        cpu_s: CPU seconds.
        memory_bytes: of address space.
        file_bytes: of any one file.
    """
    _die_with(parent)
    os.chdir(folder)
    job = open("job.json", encoding="utf-8")
    os.unlink("job.json")
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if os.getuid() == 0:
        _leave_root(folder)
        _die_with(parent)  # a change of user cancels it
    if "processes" in isolate(folder):
        launcher = os.getpid()
        child = os.fork()  # the first process of the new namespace; when it ends, all the others are killed
        if child:
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) != 0)
        _die_with(launcher, namespaced=True)
    limit(cpu_s=cpu_s, memory_bytes=memory_bytes, file_bytes=file_bytes)
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the same user's player may not look into this process
    judge = os.getpid()
    (asked, asks), (told, tells) = os.pipe(), os.pipe()
    if os.fork() == 0:
        try:
            for secret in (report, job.fileno(), asks, told):
                os.close(secret)  # before a line of the program runs
            _die_with(judge)
            play(os.fdopen(asked), os.fdopen(tells, "w"))
        finally:
            os._exit(1)
    os.close(asked)
    os.close(tells)
    try:
        with job:
            content = json.load(job)
        run_tests(content["program"], content["tests"], asks=os.fdopen(asks, "w"), told=os.fdopen(told))
    except BaseException:  # SystemExit too: whatever ends the tests early has passed nothing
        os._exit(1)
    os.write(report, content["token"].encode())
    os._exit(0)


def play(asked: IO[str], tells: IO[str]) -> None:
    """The player: executes a program, says what it defines, and calls its functions until nobody asks any more.

    Args:
        asked: one JSON value a line: the program's source, then [function, encoded arguments, encoded keywords].
        tells: one JSON value a line: {name: encoded value, or null for a function}, then for each call [encoded value],
            or [] when the function raised or its value is no plain data.
    """
    # Its module is not called "__main__": a script's main block does not run.
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look their module up
    exec(compile(json.loads(asked.readline()), "<solution>", "exec"), module.__dict__)
    print(json.dumps(dict(_defined(module.__dict__))), file=tells, flush=True)
    for line in asked:
        name, arguments, keywords = json.loads(line)
        try:
            answer = json.dumps([encode(module.__dict__[name](*decode(arguments), **decode(keywords)))])
        except BaseException:
            answer = "[]"
        print(answer, file=tells, flush=True)


def run_tests(program: str, tests: str, *, asks: IO[str], told: IO[str]) -> None:
    """The judge: executes tests, in which the program's functions are calls to the player.

    Args:
        program: Python source.
        tests: Python source that raises unless the program is right; it may use the functions, and the plain values,
            that the program defines, builtins excepted.
        asks: the player's `asked`.
        told: the player's `tells`.

    Raises:
        Exception: the tests', or that of a function that raised, ended the player or gave something else than data.
    """

    def tell() -> Any:
        line = told.readline(MAX_MESSAGE_CHARS)
        if not line.endswith("\n"):
            raise EOFError("the program ended, or gave too much")
        return json.loads(line)

    def function(name: str) -> Callable:
        def call(*arguments: object, **keywords: object) -> object:
            print(json.dumps([name, encode(list(arguments)), encode(keywords)]), file=asks, flush=True)
            (value,) = tell()
            return decode(value)

        return call

    print(json.dumps(program), file=asks, flush=True)
    defined = {name: function(name) if value is None else decode(value) for name, value in tell().items()}
    scope = {name: value for name, value in defined.items() if not hasattr(builtins, name) and name[:2] != "__"}
    exec(compile(tests, "<tests>", "exec"), scope)


def encode(value: object) -> Any:
    """Plain data as JSON's types.

    Args:
        value: None, a number, text, bytes, or a list, tuple, set or dict of such; of a subclass, what it is based on;
            NumPy's arrays and numbers as lists and numbers.

    Returns:
        Text, booleans and numbers as themselves (a whole Fraction or Decimal as an int, another as a float); the rest
        as [kind, ...].

    Raises:
        TypeError: anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return ["none"] if value is None else str(value) if isinstance(value, str) else value
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", *value]
    if isinstance(value, dict):
        return ["dict", *([encode(k), encode(v)] for k, v in value.items())]
    for kind, container in _CONTAINERS.items():
        if isinstance(value, container):
            return [kind, *map(encode, value)]  # type: ignore[call-overload]
    if hasattr(value, "tolist"):
        return encode(value.tolist())
    if isinstance(value, numbers.Number):
        return int(value) if value == int(value) else float(value)  # type: ignore[call-overload, arg-type]
    raise TypeError(f"no plain data: {type(value).__name__}")


def decode(data: Any) -> Any:
    """What `encode` was given.

    Args:
        data: of `encode`.

    Returns:
        New objects of Python's own types.
    """
    if not isinstance(data, list):
        return data
    kind, *rest = data
    if kind == "dict":
        return {decode(k): decode(v) for k, v in rest}
    if kind == "bytes":
        return bytes(rest)
    if kind in ("none", "complex"):
        return complex(*rest) if rest else None
    return _CONTAINERS[kind](map(decode, rest))


_CONTAINERS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def _defined(names: dict[str, object]) -> Iterator[tuple[str, Any]]:
    for name, value in list(names.items()):
        if callable(value):
            yield name, None
            continue
        try:
            yield name, encode(value)
        except (TypeError, RecursionError):
            pass  # a module, for instance


def isolate(folder: str) -> frozenset[str]:
    """Takes everything away that the kernel lets it: see the list above.

    Args:
        folder: where files may still be written.

    Returns:
        Which of "network", "processes", "files" are in force.
    """
    uid, gid = os.geteuid(), os.getegid()
    got = set()
    if _libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC) == 0:
        got |= {"network", "processes"}
        # Without a mapping no file can be made; mapped to itself, the user owns what it owned.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as f:
                f.write(text)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _landlock(folder):
        got.add("files")
    # capset, version 3: effective, permitted and inheritable sets empty
    _libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6))
    return frozenset(got)


def limit(*, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Sets the limits of this process and its children."""
    for what, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, PROCESSES),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _die_with(parent: int, *, namespaced: bool = False) -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the call. A parent outside of the process namespace reads as 0.
    if os.getppid() != (0 if namespaced else parent):
        os._exit(1)


def _leave_root(folder: str) -> None:
    needed = {os.path.dirname(folder), os.path.dirname(os.__file__), sys.prefix, sys.base_prefix, json.__path__[0]}
    ancestors = {path[:i] or "/" for path in needed for i in range(len(path) + 1) if path[i : i + 1] in ("/", "")}
    if any(os.stat(path).st_mode & 0o001 == 0 for path in ancestors):
        os.setresuid(NOBODY, 0, 0)  # files stay readable, and the limit on processes goes by the real user
        return
    os.chown(folder, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self belongs to root, and no mapping can be written


def _landlock(folder: str) -> bool:
    create, add_rule, restrict = SYS_LANDLOCK
    abi = _libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    changes = LANDLOCK_CHANGES | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    reads = LANDLOCK_READ | LANDLOCK_EXECUTE
    attributes = [changes | reads]
    if abi >= 4:
        attributes.append(3)  # no TCP socket may be bound or connected
    if abi >= 6:
        attributes.append(3)  # no signal to, no abstract socket of, a process outside
    packed = struct.pack(f"{len(attributes)}Q", *attributes)
    ruleset = _libc.syscall(create, packed, ctypes.c_size_t(len(packed)), 0)
    if ruleset < 0:
        return False
    try:
        beneath_each = {path: reads for path in (*READABLE, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))}
        for path, rights in {**beneath_each, folder: changes | reads, os.devnull: LANDLOCK_WRITE | LANDLOCK_READ}.items():
            if not os.path.exists(path):
                continue
            if not os.path.isdir(path):
                rights &= LANDLOCK_EXECUTE | LANDLOCK_WRITE | 1 << 2  # the others are of folders
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
            failed = _libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", rights, beneath), 0)
            os.close(beneath)
            if failed:
                return False
        return _libc.syscall(restrict, ruleset, 0) == 0
    finally:
        os.close(ruleset)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))
