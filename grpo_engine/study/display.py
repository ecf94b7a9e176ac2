"""What a study shows while it runs."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_engine.study.design import CELLS, Plan
from grpo_engine.study.jobs import StudyResult, Tracked, failure_of
from grpo_engine.study.plan_view import duration
from grpo_engine.study.status import last_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Display:
    """A live table on a terminal, plain lines elsewhere (one when a job starts or ends, and one a minute)."""

    EVERY_S = 60.0

    def __init__(
        self,
        folder: Path,
        the_plan: Plan,
        tracked: Mapping[str, Tracked],
        num_skipped: int,
        jobs: int,
        console: Console | None,
    ) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.folder = folder
        self.study = the_plan.study.name
        self.num_cells = len(the_plan.cells)
        self.folders = {c.folder for c in the_plan.cells}
        self.tracked = tracked
        self.num_skipped = num_skipped
        self.jobs = jobs
        self.losses: dict[str, float] = {}  # the last of each cell
        self.last_loss = ""
        self.live: Any = None
        self.last = time.monotonic()

    def __enter__(self) -> Display:
        self._say(
            f"study {self.study} in {self.folder}: {self.num_cells} cells, {self.num_skipped} done before, "
            f"{len(self.tracked) - (self.num_cells - self.num_skipped)} models to prepare, {self.jobs} at once"
        )
        if strangers := self._strangers():
            self._say(f"{strangers} folders of an earlier plan lie in {self.folder / CELLS} and are left alone")
        if self.console.is_terminal:
            from rich.live import Live

            self.live = Live(self._table(), console=self.console, refresh_per_second=4, transient=True)
            self.live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.update(self._table())
            self.live.__exit__(None, None, None)

    def _strangers(self) -> int:
        """Folders of cells that the study no longer has, because a setting or the engine's defaults changed."""
        found = {f"{CELLS}/{p.name}" for p in (self.folder / CELLS).iterdir() if p.is_dir()}
        return len(found - self.folders)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def started(self, t: Tracked) -> None:
        if not self.live:
            self._say(f"{t.job.name}: started")

    def ended(self, t: Tracked) -> None:
        if t.state == "failed":
            self._say(str(failure_of(t)))
        elif t.state == "waiting":
            self._say(f"{t.job.name}: {failure_of(t).reason}; it is started again ({t.job.log})")
        elif not self.live:
            loss = t.progress.get("loss")
            end = f", test loss {loss:.3f}" if loss is not None else ""
            self._say(f"{t.job.name}: done in {duration(t.seconds or 0)}{end} ({self._counts()})")

    def update(self) -> None:
        self._note_losses()
        if self.live:
            self.live.update(self._table())
        elif time.monotonic() - self.last >= self.EVERY_S:
            self.last = time.monotonic()
            running = "; ".join(
                f"{t.job.name} {self._step(t)}".strip() for t in self.tracked.values() if t.state == "running"
            )
            self._say(f"{self._counts(every=True)}: {running}")

    def summary(self, result: StudyResult) -> None:
        text = f"study {self.study}: {len(result.done) + len(result.skipped)} of {self.num_cells} cells done"
        if result.interrupted is not None:
            text += f", interrupted by {signal.Signals(result.interrupted).name}; the same command goes on from here"
        if result.failures:
            text += f"; failed: {', '.join(f.name for f in result.failures)}"
        if result.blocked:
            text += f"; not started for want of their model: {', '.join(result.blocked)}"
        self._say(f"{text} ({duration(result.seconds)})")

    def _counts(self, *, every: bool = False) -> str:
        """Cells done and time left; with `every`, also what runs, what failed and the last test loss."""
        of = {s: [t for t in self.tracked.values() if t.state == s] for s in ("done", "running", "failed")}
        parts = [f"{self.num_skipped + sum(t.job.cell is not None for t in of['done'])} of {self.num_cells} cells"]
        if every:
            parts += [f"{len(of[s])} {s}" for s in ("running", "failed") if of[s]]
        if (left := self._seconds_left()) is not None:
            parts.append(f"about {duration(left)} left")
        if every and self.last_loss:
            parts.append(self.last_loss)
        return ", ".join(parts)

    def _note_losses(self) -> None:
        for t in self.tracked.values():
            loss = t.progress.get("loss")
            if loss is not None and self.losses.get(t.job.name) != loss:
                self.losses[t.job.name] = loss
                self.last_loss = f"last test loss {loss:.3f} ({t.job.name})"

    def _seconds_left(self) -> float | None:
        """Estimates of the plan, scaled by how they did so far, over the processes that can be kept busy."""
        now = time.monotonic()
        spent = planned = left = longest = 0.0
        for t in self.tracked.values():
            share = 0.0
            if t.state == "done":
                spent, planned = spent + (t.seconds or 0), planned + t.job.seconds
            elif t.state == "running":
                steps = t.job.cell.config.steps if t.job.cell else 0
                share = t.progress.get("step", 0) / steps if steps else 0.0
                if share > 0:
                    spent, planned = spent + now - t.started, planned + t.job.seconds * share
            if t.state in ("running", "waiting"):
                left += t.job.seconds * (1 - share)
                longest = max(longest, t.job.seconds * (1 - share))
        if planned == 0 or left == 0:
            return None
        return max(left / self.jobs, longest) * spent / planned

    def _step(self, t: Tracked) -> str:
        if t.job.cell is None:
            return last_line(t.job.log)
        return f"step {t.progress.get('step', 0)} of {t.job.cell.config.steps}"

    def _table(self) -> RenderableType:
        from rich.table import Table

        table = Table(title=f"{self.study}: {self._counts(every=True)}", title_justify="left", expand=False)
        for name, side in (("cell", "left"), ("state", "left"), ("reward", "right"), ("test loss", "right"),
                           ("time left", "right")):  # fmt: skip
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        rows = list(self.tracked.values())
        room = max(4, self.console.size.height - 8)
        if len(rows) > room:  # what runs and what failed first, then what is next
            rank = {"failed": 0, "running": 1, "waiting": 2, "blocked": 3, "done": 4}
            rows = sorted(rows, key=lambda t: rank[t.state])[:room]
        for t in rows:
            reward, loss = t.progress.get("reward"), t.progress.get("loss")
            left = ""
            if t.state == "running" and t.job.cell and t.progress.get("step"):
                step = t.progress["step"]
                left = duration((time.monotonic() - t.started) / step * (t.job.cell.config.steps - step))
            elif t.state == "done":
                left = f"in {duration(t.seconds or 0)}"
            style = {"failed": "red", "running": "bold", "done": "green", "waiting": "dim", "blocked": "red"}[t.state]
            state = self._step(t) if t.state == "running" else t.state
            table.add_row(
                t.job.name,
                state,
                "" if reward is None else f"{reward:.3f}",
                "" if loss is None else f"{loss:.3f}",
                left,
                style=style,
            )
        if len(self.tracked) > len(rows):
            table.caption = f"and {len(self.tracked) - len(rows)} more"
        return table
