"""What a person sees of a run while it works; nothing when standard error is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from grpo_engine.config import RunConfig
from grpo_engine.records.cost import COST_HEAD, cost_rows
from grpo_engine.records.records import EvalResult, PhaseCost, StepRecord
from grpo_engine.types import EvalSet


class RunProgress:
    """A bar over the steps with reward, loss, tokens/s and time left, and a line for what is being done."""

    def __init__(self, config: RunConfig, *, quiet: bool | None = None) -> None:
        """Prepares the bar; it is drawn between `__enter__` and `__exit__`.

        Args:
            config: of the run.
            quiet: no output; None: quiet when standard error is no terminal.
        """
        self.quiet = not sys.stderr.isatty() if quiet is None else quiet
        self.config = config
        self._console = Console(stderr=True, quiet=self.quiet)
        # without a terminal a log may read along, unless silence was asked for
        self._log = Console(stderr=True, quiet=bool(quiet)) if self.quiet else self._console
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self.quiet,
        )
        self._steps = self._bar.add_task(escape(config.name), total=config.steps, facts="")
        self._inner = self._bar.add_task("", total=None, facts="", visible=False)
        self._facts = {"reward": "", "loss": "", "tokens/s": "", "pass@1": ""}
        self._tokens_before = 0
        self._began = 0.0

    def __enter__(self) -> RunProgress:
        self._bar.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.__exit__(*exc)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def announce(self, text: str) -> None:
        """Prints a text as it is, above the bar or, without a terminal, into the log."""
        self._log.print(Text(text), soft_wrap=True)

    def start_step(self, step: int) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        self._bar.update(self._steps, completed=step - 1)
        self._bar.update(self._inner, description="  answers", visible=True, completed=0)

    def rollout(self, finished: int, wanted: int) -> None:
        """Answers finished so far; what `rollout.generate` reports to."""
        self._bar.update(self._inner, completed=finished, total=wanted)

    def finish_step(self, record: StepRecord) -> None:
        """A step is done."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        tokens = record.trained_tokens - self._tokens_before
        self._tokens_before = record.trained_tokens
        if record.reward_mean is not None:
            self._facts["reward"] = f"{record.reward_mean:.3f}"
        if record.loss is not None:
            self._facts["loss"] = f"{record.loss:.4f}"
        self._facts["tokens/s"] = f"{tokens / seconds:,.0f}"
        self._show(record.step)

    def start_evaluation(self, sets: Sequence[EvalSet]) -> None:
        """An evaluation begins."""
        names = escape(", ".join(s.name for s in sets))
        self._bar.update(self._inner, description=f"  test {names}", visible=True, completed=0)

    def finish_evaluation(self, results: Sequence[EvalResult]) -> None:
        """An evaluation is done; the sampled result of the last set in domain is shown beside the bar."""
        for result in results:
            if result.mode == "sample" and result.in_domain:
                self._facts["pass@1"] = f"{result.pass1:.3f}"
        self._bar.update(self._steps, facts=self._text())

    def finish_run(self, costs: Mapping[str, PhaseCost]) -> None:
        """The run is done; prints where its time went."""
        table = Table(title=f"{escape(self.config.name)}: where the time went", title_justify="left", box=None)
        for i, name in enumerate(COST_HEAD):
            table.add_column(name, justify="right" if i else "left")
        for row in cost_rows(costs):
            table.add_row(*row)
        self._console.print(table, highlight=False)

    def _show(self, step: int) -> None:
        self._bar.update(self._steps, completed=step, facts=self._text())

    def _text(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._facts.items() if value)
