"""The process that runs a model's program: locks itself in, runs it, reports.

Started by `grpo_engine.rewards.code` as a script of its own, so it imports the standard library alone. What it sets up,
each only where the kernel allows (`protections` tells):

    network       a network namespace of its own, without an interface
    processes     a process namespace of its own: nothing else can be signalled, and everything ends with it
    files         Landlock: written, made or removed only inside its own temporary folder
    limits        CPU time, memory, file size, open files, number of processes, no core dump
    privileges    none can be gained, capabilities are dropped; a superuser becomes nobody where nobody can read
                  this Python, and otherwise nobody in name only, so that the limit on processes binds

What it does not do: files that the user may read stay readable (nothing can be sent anywhere, and the only answer is
pass or fail), the kernel itself is trusted, and the tests share a process with the program, so a program that is
written to deceive them (an object that equals everything, a search through the caller's frames) succeeds.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import types

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
NOBODY = 65534
SYS_LANDLOCK = (444, 445, 446)  # create_ruleset, add_rule, restrict_self: the same on every architecture
LANDLOCK_WRITE = 1 << 1
# remove_dir 4, remove_file 5, make_* 6 to 12; refer (rename across folders) 13 since ABI 2; truncate 14 since ABI 3
LANDLOCK_CHANGES = LANDLOCK_WRITE | sum(1 << bit for bit in range(4, 13))
OPEN_FILES, PROCESSES = 64, 32

_libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int, folder: str, cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Reads {"program", "tests", "token"} from the folder's job.json and writes the token to stdout if all tests pass.

    Args:
        parent: process id of the caller; with its death this process dies.
        folder: the temporary folder; becomes the working directory.
        cpu_s: CPU seconds.
        memory_bytes: of address space.
        file_bytes: of any one file.
    """
    _die_with(parent)
    os.chdir(folder)
    with open("job.json") as f:
        job = json.load(f)
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
    try:
        run(job["program"], job["tests"])
    except BaseException:  # SystemExit too: a program that leaves early has passed nothing
        os._exit(1)
    os.write(report, job["token"].encode())
    os._exit(0)


def run(program: str, tests: str) -> None:
    """Executes a program, then its tests among its names.

    Args:
        program: Python source. Its module is not called "__main__": a script's main block does not run.
        tests: Python source that raises unless the program is right.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module  # dataclasses and pickle look their module up
    exec(compile(program, "<solution>", "exec"), module.__dict__)
    exec(compile(tests, "<tests>", "exec"), module.__dict__)


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
            with open(f"/proc/self/{name}", "w") as f:
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
    attributes = [changes]
    if abi >= 4:
        attributes.append(3)  # no TCP socket may be bound or connected
    if abi >= 6:
        attributes.append(3)  # no signal to, no abstract socket of, a process outside
    packed = struct.pack(f"{len(attributes)}Q", *attributes)
    ruleset = _libc.syscall(create, packed, ctypes.c_size_t(len(packed)), 0)
    if ruleset < 0:
        return False
    try:
        for path, rights in ((folder, changes), (os.devnull, LANDLOCK_WRITE)):
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
