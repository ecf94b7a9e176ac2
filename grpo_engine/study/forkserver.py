"""One process that has imported everything, and forks a process for each job: a job starts in milliseconds.

Importing torch costs a second of CPU time, and a small study has more jobs than minutes. `ForkServer` starts

    python -m grpo_engine.study.forkserver SOCKET PARENT MODULE

which imports MODULE, calls its `preload()` and then forks for every request. A job is a process as any other: it
leads a session and process group of its own, writes to its own log, is killed by its number, and ends as Python ends.

A fork copies one thread only, so the server must have no other: `serve` checks that before it forks. It never
computes anything itself; libraries start their threads in the jobs.

Request and replies are lines of JSON on a socket:

    {"log": path, "arguments": [...]}                  start MODULE.main(arguments), output appended to the log
    {"pid": 123}                                       it is started
    {"pid": 123, "code": 0}                            it has ended, negative for a signal
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

START_S = 300.0  # for a server to import all and start its first job
END_S = 5.0  # for a server that has failed to say why
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class ForkServer:
    """The side that asks. Its process ends with `close`, with this one, and by any signal; jobs end with it.

    A server that was killed counts its jobs as killed; the next `start` starts another one.

    Args:
        module: dotted name of a module with `preload()` and `main(arguments) -> int`.
        environment: of the server and its jobs.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        self._module = module
        # OpenBLAS starts its threads when numpy is imported, and no job multiplies with it
        self._environment = dict(environment) | {"OPENBLAS_NUM_THREADS": "1"}
        self._running: set[int] = set()
        self._codes: dict[int, int] = {}
        self._launch()

    def start(self, arguments: Sequence[str], log: Path) -> int:
        """Starts a job.

        Args:
            arguments: what the module's `main` is given.
            log: standard output and error are appended to it.

        Returns:
            Its process number, which is that of its process group too.

        Raises:
            RuntimeError: no server can be started; it has said why on standard error.
        """
        request = json.dumps({"arguments": list(arguments), "log": str(log)}).encode() + b"\n"
        for _ in range(2):  # again when it was killed since the last look
            if self._socket.fileno() < 0:
                self._launch()
            with contextlib.suppress(ConnectionError):
                self._socket.sendall(request)
                while "code" in (reply := self._reply(START_S)):
                    pass
                if reply:
                    self._running.add(reply["pid"])
                    self._codes.pop(reply["pid"], None)  # of an earlier job with this number
                    return reply["pid"]
            self._give_up()
        raise RuntimeError(f"the process that starts jobs ({self._module}) ended before it started one")

    def poll(self, pid: int) -> int | None:
        """How a job ended.

        Args:
            pid: that `start` returned.

        Returns:
            The exit code, negative for a signal; None while it runs.
        """
        try:
            while pid in self._running and self._reply(0.0):
                pass
        except ConnectionError:
            self._give_up()
        return self._codes.get(pid)

    def close(self) -> None:
        """Ends the server and with it every job."""
        self._process.kill()
        self._give_up()

    def _launch(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._buffer = b""
        with theirs:
            self._process = subprocess.Popen(
                (sys.executable, "-m", __spec__.name, str(theirs.fileno()), str(os.getpid()), self._module),
                stdin=subprocess.DEVNULL,
                env=self._environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the study, which then ends its jobs
            )

    def _reply(self, timeout_s: float) -> dict[str, int]:
        """The next reply, or {} when there is none in time; ends of jobs are noted."""
        while b"\n" not in self._buffer:
            if not select.select([self._socket], [], [], timeout_s)[0]:
                return {}
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionResetError
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        if "code" in reply:
            self._running.discard(reply["pid"])
            self._codes[reply["pid"]] = reply["code"]
        return reply

    def _give_up(self) -> None:
        """The server ends, and Linux kills its jobs then; elsewhere they are killed here."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()
        for pid in self._running:
            kill_group(pid, signal.SIGKILL)
            self._codes[pid] = -signal.SIGKILL
        self._running.clear()


def kill_group(pid: int, number: int) -> None:
    """Sends a signal to a process group; one that is gone is no error."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def end_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent is gone, even by SIGKILL; elsewhere it does nothing.

    Args:
        parent: process number of the parent; when that is gone already, this process exits.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"process {parent} ended before what it started began")


def num_threads() -> int | None:
    """Threads of this process, those of libraries too; None where the system does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return None


def serve(connection: socket.socket) -> list[str] | None:
    """Forks a process for each request.

    Args:
        connection: where requests come from; its end is the server's end.

    Returns:
        None in the server, when the other side is gone. In a job, which leaves this function too, so that it ends as
        any Python process does, its arguments.

    Raises:
        RuntimeError: a library has started threads, which a fork would lose in the middle of what they do.
    """
    server, jobs, buffer = os.getpid(), set(), b""
    wake, ended = socket.socketpair()  # a byte for every SIGCHLD
    ended.setblocking(False)
    signal.set_wakeup_fd(ended.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    gc.freeze()  # what is imported stays: no collection in a job walks over it, and its pages stay shared
    while True:
        ready, _, _ = select.select([connection, wake], [], [])
        if wake in ready:
            wake.recv(4096)
            for pid in sorted(jobs):
                ended_pid, status = os.waitpid(pid, os.WNOHANG)
                if ended_pid:
                    jobs.discard(pid)
                    _send(connection, pid=pid, code=os.waitstatus_to_exitcode(status))
        if connection in ready:
            received = connection.recv(65536)
            if not received:
                return None
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                if (num_threads() or 1) > 1:
                    raise RuntimeError(f"{num_threads()} threads run where jobs are forked: an import has started some")
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become_job(server, request["log"])
                    for open_socket in (connection, wake, ended):
                        open_socket.close()
                    return request["arguments"]
                # here as well as in the job, so that the group is there whoever is first
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.setpgid(pid, pid)
                jobs.add(pid)
                _send(connection, pid=pid)


def _send(connection: socket.socket, **reply: int) -> None:
    with contextlib.suppress(ConnectionError):  # the other side is gone: the next read says so
        connection.sendall(json.dumps(reply).encode() + b"\n")


def _become_job(server: int, log: str) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    end_with(server)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)


if __name__ == "__main__":
    number, parent, name = sys.argv[1:]
    end_with(int(parent))
    module = importlib.import_module(name)
    module.preload()
    with socket.socket(fileno=int(number)) as requests:
        job = serve(requests)
    if job is not None:
        sys.exit(module.main(job))
