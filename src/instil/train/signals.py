"""Signals while a run trains: Ctrl-C and SIGTERM ask for a save, a closed terminal does not matter, pauses are known."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

FORCE_S = 2.0  # a second Ctrl-C within this time leaves at once


@dataclass
class Asked:
    """What signals have asked for: signal = the first of SIGINT and SIGTERM; paused: the process was stopped and went on."""

    signal: int | None = None
    at: float = 0.0
    paused: bool = False

    @property
    def name(self) -> str:
        """SIGINT or SIGTERM."""
        return "" if self.signal is None else signal.Signals(self.signal).name

    def without_pauses(self, seconds: float, usual: float) -> float:
        """The time of a step; the usual one where the process was stopped meanwhile (SIGSTOP), which no clock tells."""
        if not self.paused:
            return seconds
        self.paused = False
        return min(seconds, usual) if usual else seconds


@contextmanager
def listening() -> Iterator[Asked]:
    """SIGINT and SIGTERM ask the loop to stop after the step; a second Ctrl-C within FORCE_S leaves at once.

    SIGHUP (the terminal was closed) changes nothing. Outside the main thread signals stay with the caller.
    """
    asked = Asked()

    def stop(number: int, _frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and asked.signal == number and now - asked.at < FORCE_S:
            raise KeyboardInterrupt
        if asked.signal is None:
            asked.signal, asked.at = number, now

    def went_on(_number: int, _frame: object) -> None:
        asked.paused = True

    handlers: dict[str, Any] = {"SIGINT": stop, "SIGTERM": stop, "SIGHUP": signal.SIG_IGN, "SIGCONT": went_on}
    before = {}
    try:
        for name, handler in handlers.items():
            if hasattr(signal, name):
                number = getattr(signal, name)
                before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
