"""What is to be seen while a load runs: a bar on a terminal, one line per round elsewhere. Always on stderr."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .load_client import Record
from .load_stats import Round

UPDATES_PER_S = 4
"""Drawing takes time from the same interpreter that takes timestamps."""


class ProgressDisplay:
    """A `Progress` of load_run; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), console=console, transient=True, refresh_per_second=UPDATES_PER_S,
            )  # fmt: skip
        self._task: TaskID | None = None
        self._title = ""
        self._num_tokens = 0
        self._num_failed = 0
        self._began_s = 0.0
        self._shown_s = 0.0

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin_round(self, title: str, num_requests: int | None, duration_s: float | None) -> None:
        limit = f" for {duration_s:g} s" if duration_s is not None else ""
        self._title = title + limit
        self._num_tokens = self._num_failed = 0
        self._began_s = time.perf_counter()
        self._shown_s = 0.0
        if self._bar is not None:
            self._task = self._bar.add_task(self._title, total=num_requests, rate="")

    def finished(self, record: Record) -> None:
        self._num_tokens += record.output_tokens if record.ok else 0
        self._num_failed += not record.ok
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
            now_s = time.perf_counter()
            if now_s - self._shown_s > 1 / UPDATES_PER_S:
                self._shown_s = now_s
                self._bar.update(self._task, rate=self._rate(now_s - self._began_s))

    def end_round(self, round_: Round) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        text = f"{self._title}: {len(round_.records)} requests in {round_.wall_s:.1f} s, {self._rate(round_.wall_s)}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _rate(self, seconds: float) -> str:
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        return f"{self._num_tokens / seconds if seconds > 0 else 0:,.1f} output tok/s{failed}"
