"""Scores answers in processes that can be killed: no verifier can hang a run or end it.

Each worker is a pebble pool of one process, a *lane*, so that lanes share no lock: what one verifier does to its
process never reaches another's. An answer whose verifier exceeds the limit, dies or raises costs one zero, with the
reason as its status; its lane gets a fresh process, and the other lanes do not wait.
"""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool

import pebble

from grpo_engine.config import RewardConfig
from grpo_engine.rewards import HARMLESS, import_scorer, scorer_target
from grpo_engine.rewards.worker import Outcome, checked, prepare, run
from grpo_engine.system.processes import SpawnContext
from grpo_engine.types import Problem, Reward, RewardStatus

Progress = Callable[[int, int], None]  # (answers scored, answers to score)
OnScored = Callable[[int, Reward], None]  # (which response, its reward)

MEMORY_BYTES = 4 << 30  # of a worker
START_S = 60.0  # for a fresh worker to take up its first answer
GRACE_S = 5.0  # after the limit, for pebble to kill a worker, before the whole lane is given up
MAX_RESTARTS = 3  # of a lane in a row without any answer scored

_PROGRAMS = {scorer_target(name) for name in ("code", "paper_code")}  # scorers that run programs

_log = logging.getLogger(__name__)


class RewardPool:
    """Killable workers that score answers.

    Workers are started when the first answer needs one, and never by a fork of this process, which may hold torch's
    threads; they import neither torch nor the caller's main module. Use it as a context manager, or call `close`.

    Example:
        with RewardPool(workers=2, timeout_s=10.0) as pool:
            rewards = pool.score(["so \\\\boxed{4}"], [problem])  # [Reward(value=1.0, status="ok")]
    """

    def __init__(self, *, workers: int, timeout_s: float, unprotected: bool = False) -> None:
        """Starts nothing yet.

        Args:
            workers: processes, at least 1.
            timeout_s: wall-clock limit of one answer in seconds, > 0. Results can depend on the machine's speed near
                the limit only: leave it generous.
            unprotected: run programs, with a warning, also where the kernel refuses a protection of the sandbox.

        Raises:
            ValueError: workers < 1, or timeout_s not positive and finite.
        """
        if workers < 1:
            raise ValueError(f"RewardPool: workers must be at least 1, got {workers}")
        if not (math.isfinite(timeout_s) and timeout_s > 0):
            raise ValueError(f"RewardPool: timeout_s must be positive and finite, got {timeout_s}")
        self.workers = workers
        self.timeout_s = timeout_s
        self.unprotected = unprotected
        self._lanes: list[_Lane] = []
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._targets: tuple[str, ...] = ()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers, busy or not; a `score` under way in another thread raises. Again: does nothing."""
        self._closed = True
        self._stop_lanes()

    def begin(
        self, problems: Sequence[Problem], *, progress: Progress | None = None, on_scored: OnScored | None = None
    ) -> Scoring:
        """Opens the scoring of answers that are yet to come, so that workers score the first while others are made.

        Args:
            problems: N problems; problems[i].reward names the scorer of answer i.
            progress: called after each answer with how many are scored and N.
            on_scored: called with each response's index and reward, in the order in which they are scored.

        Returns:
            A `Scoring`, to be used as a context manager; another one waits until it is left.

        Raises:
            ValueError: a problem names no known scorer.
            RuntimeError: the pool is closed, or there are programs to run and the kernel refuses a protection.
        """
        targets = {name: scorer_target(name) for name in dict.fromkeys(p.reward for p in problems)}
        if not _PROGRAMS.isdisjoint(targets.values()):
            self._check_protections()
        return Scoring(self, problems, targets, progress, on_scored)

    def score(
        self, responses: Sequence[str], problems: Sequence[Problem], *, progress: Progress | None = None
    ) -> list[Reward]:
        """Scores each response against its problem.

        Args:
            responses: N decoded answers.
            problems: N problems; problems[i].reward names the scorer of responses[i].
            progress: called after each answer with how many are scored and N.

        Returns:
            N rewards in the order of the responses. A verifier that exceeds timeout_s gives status "timeout", one
            that ends its process "crash", one that raises or returns no number in [0, 1] "error"; each is worth 0
            and named in the log.

        Raises:
            ValueError: lengths differ, or a problem names no known scorer.
            RuntimeError: see `begin`; or workers cannot be started.
        """
        if len(responses) != len(problems):
            raise ValueError(f"RewardPool.score: {len(responses)} responses do not go with {len(problems)} problems")
        with self.begin(problems, progress=progress) as scoring:
            scoring.add(range(len(responses)), responses)
            return scoring.finish()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise RuntimeError("RewardPool: the pool is closed")

    def _check_protections(self) -> None:
        from grpo_engine.rewards.code import missing_protections

        if not (missing := missing_protections()):
            return
        what = f"protection of {', '.join(missing)}: this kernel refuses it"
        if not self.unprotected:
            raise RuntimeError(
                f"RewardPool: a model's programs would run without {what}; reward.unprotected=true runs them all the same"
            )
        if _PROGRAMS.isdisjoint(self._targets):  # once
            _log.warning("programs run without %s", what)

    def _start_lanes(self, targets: dict[str, str]) -> None:
        wanted = tuple(sorted({t for name, t in targets.items() if name not in HARMLESS} | set(self._targets)))
        self._targets = wanted
        if not self._lanes:
            self._scratch = tempfile.TemporaryDirectory(prefix="grpo_engine-pool-", ignore_cleanup_errors=True)
            os.chmod(self._scratch.name, 0o711)  # a sandbox that gives up its user must still reach its own folder
            self._lanes = [_Lane(self.timeout_s, wanted, self._scratch.name) for _ in range(self.workers)]

    def _stop_lanes(self) -> None:
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.stop()
        if self._scratch is not None:
            self._scratch.cleanup()


def reward_pool(config: RewardConfig) -> RewardPool:
    """The pool that a configuration asks for; see `RewardPool`."""
    return RewardPool(workers=config.workers, timeout_s=config.timeout_s, unprotected=config.unprotected)


class Scoring:
    """Answers on their way through a pool; see `RewardPool.begin`.

    Harmless scorers run where the answer is added. The others run in workers, which get their next answers whenever
    one is added: no thread of this process waits for them.
    """

    def __init__(
        self,
        pool: RewardPool,
        problems: Sequence[Problem],
        targets: dict[str, str],
        progress: Progress | None,
        on_scored: OnScored | None,
    ) -> None:
        self._pool, self._problems, self._targets = pool, problems, targets
        self._progress, self._on_scored = progress, on_scored
        self._here = {name: import_scorer(target) for name, target in targets.items() if name in HARMLESS}
        self._rewards: list[Reward | None] = [None] * len(problems)
        self._responses: dict[int, str] = {}  # that workers have yet to score
        self._waiting: collections.deque[int] = collections.deque()
        self._idle: list[_Lane] = []
        self._busy: dict[concurrent.futures.Future, tuple[_Lane, int]] = {}
        self._scored = 0
        self._failures: list[tuple[int, str, str]] = []

    def __enter__(self) -> Scoring:
        self._pool._lock.acquire()
        try:
            self._pool._refuse_closed()
        except BaseException:
            self._pool._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._waiting or self._busy:  # left early, by an exception
                self._pool._stop_lanes()
        finally:
            self._pool._lock.release()

    def add(self, indices: Iterable[int], responses: Iterable[str]) -> None:
        """Gives some answers to be scored.

        Args:
            indices: which answers; each once.
            responses: decoded, one an index.

        Raises:
            RuntimeError: the pool is closed, or workers cannot be started.
        """
        for index, response in zip(indices, responses, strict=True):
            problem = self._problems[index]
            if problem.reward in self._here:
                try:
                    outcome = checked(self._here[problem.reward], response, problem)
                except Exception as e:
                    outcome = Outcome(0.0, f"{type(e).__name__}: {e}")
                self._record(index, outcome, "error" if outcome.error else "ok")
            else:
                self._responses[index] = response
                self._waiting.append(index)
        if self._waiting or self._busy:
            self._pump(timeout=0.0)

    def finish(self) -> list[Reward]:
        """Waits for the answers that are not scored yet.

        Returns:
            N rewards in the order of the problems.

        Raises:
            ValueError: an answer was never added.
            RuntimeError: see `add`.
        """
        while self._waiting or self._busy:
            self._pump(timeout=1.0)
        if None in self._rewards:
            raise ValueError(f"Scoring.finish: answer {self._rewards.index(None)} was never added")
        self._report()
        return [r for r in self._rewards if r is not None]

    def _pump(self, timeout: float) -> None:
        """Feeds idle workers, waits up to `timeout` for one to be done, and takes in what is done."""
        self._pool._refuse_closed()  # by another thread: a stopped lane scores nothing any more
        if not (self._idle or self._busy):
            self._pool._start_lanes(self._targets)
            self._idle = list(self._pool._lanes)
        self._feed()
        done, _ = concurrent.futures.wait(self._busy, timeout=timeout, return_when=concurrent.futures.FIRST_COMPLETED)
        self._pool._refuse_closed()
        now = time.monotonic()
        overdue = [f for f, (lane, _) in self._busy.items() if f not in done and now > lane.deadline]
        for future in [*done, *overdue]:
            lane, index = self._busy.pop(future)
            outcome = lane.outcome(future)
            if outcome is None:  # the worker died before it took the answer up: not the answer's fault
                self._waiting.appendleft(index)
            else:
                del self._responses[index]
                self._record(index, *outcome)
            self._idle.append(lane)
        self._feed()

    def _feed(self) -> None:
        while self._idle and self._waiting:
            lane, index = self._idle.pop(), self._waiting.popleft()
            problem = self._problems[index]
            work = self._targets[problem.reward], self._responses[index], problem.answer, dict(problem.info)
            self._busy[lane.submit(*work)] = lane, index

    def _record(self, index: int, outcome: Outcome, status: RewardStatus) -> None:
        if status != "ok":
            self._failures.append((index, status, outcome.error or ""))
        self._rewards[index] = reward = Reward(value=outcome.value, status=status)
        if self._on_scored is not None:
            self._on_scored(index, reward)
        self._scored += 1
        if self._progress is not None:
            self._progress(self._scored, len(self._problems))

    def _report(self) -> None:
        if not self._failures:
            return
        counts = collections.Counter(status for _, status, _ in self._failures)
        index, status, error = min(self._failures)
        _log.warning(
            "%d of %d answers could not be scored and count as 0 (%s); the first: %s of scorer %r on problem %s%s",
            len(self._failures),
            len(self._problems),
            ", ".join(f"{n} {s}" for s, n in sorted(counts.items())),
            status,
            self._problems[index].reward,
            self._problems[index].uid,
            f": {error}" if error else "",
        )


class _Lane:
    """One worker process with at most one answer in it, replaced whenever it is lost."""

    def __init__(self, timeout_s: float, targets: tuple[str, ...], scratch: str) -> None:
        self._timeout_s, self._targets, self._scratch = timeout_s, targets, scratch
        self._restarts = 0
        self._pool = self._start()
        self.deadline = math.inf

    def submit(self, *work: object) -> concurrent.futures.Future:
        self.deadline = time.monotonic() + START_S + self._timeout_s + GRACE_S
        limit_s = math.ceil(self._timeout_s + GRACE_S)
        try:
            return self._pool.schedule(run, args=[*work, limit_s], timeout=self._timeout_s)
        except RuntimeError:  # the idle worker was killed from outside, and pebble gave its pool up
            self._restart()
            return self._pool.schedule(run, args=[*work, limit_s], timeout=self._timeout_s)

    def outcome(self, future: concurrent.futures.Future) -> tuple[Outcome, RewardStatus] | None:
        """What became of the answer: value and status, or None if no worker ever took it up."""
        if not future.done():
            taken_up = future.running()
            self._restart()
            return (Outcome(0.0), "timeout") if taken_up else None
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._restart()
            return None
        self._restarts = 0
        if error is None:
            outcome = future.result()
            return outcome, "error" if outcome.error else "ok"
        if isinstance(error, concurrent.futures.TimeoutError):
            return Outcome(0.0), "timeout"
        if isinstance(error, pebble.ProcessExpired):
            return Outcome(0.0, f"exit code {error.exitcode}"), "crash"
        return Outcome(0.0, f"{type(error).__name__}: {error}"), "error"

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()

    def _start(self) -> pebble.ProcessPool:
        return pebble.ProcessPool(
            max_workers=1,
            initializer=prepare,
            initargs=(self._targets, MEMORY_BYTES, self._scratch),
            context=SpawnContext(),
        )

    def _restart(self) -> None:
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise RuntimeError(
                f"RewardPool: a worker was lost {self._restarts} times in a row before it scored anything; "
                f"its scorers are {', '.join(self._targets)}"
            )
        self.stop()
        self._pool = self._start()
