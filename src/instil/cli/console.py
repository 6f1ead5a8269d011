"""What every verb shares: text to people on stderr, errors as lines, progress with ETA, JSON alone on stdout."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from instil.errors import InstilError
from instil.report.escape import visible_lines

if TYPE_CHECKING:
    from instil.config import Config


def share_cores() -> None:
    """Call before torch is imported: waiting threads spin for about 0.1 ms, then sleep.

    libgomp's default is to spin for minutes; on a core that another process needs too, that made single steps ten times
    slower (docs/speed.md). A value that the user has set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def looked_at(
    words: Sequence[str],
    model: str | None,
    template: str | None,
    heldout: str | None = None,
    *,
    config: bool = False,
    data: Sequence[str] | None = None,
) -> Config:
    """The configuration for words of a command line: data files, and settings as section.key=value.

    config: the words that are no settings are not data files but at most one configuration file; the data is `data`.
    """
    from instil.config import load_config
    from instil.errors import UsageError

    settings = [word for word in words if is_setting(word)]
    files = [word for word in words if not is_setting(word)]
    if config and len(files) > 1:
        raise UsageError.at(files[1], "a second configuration file", "give one file, then section.key=value")
    given: dict[str, Any] = {"model": model, "template": template, "data.heldout": share(heldout), "data.train": data}
    if not config:
        given["data.train"] = files or None
        if heldout is None and not any(word.startswith("data.heldout=") for word in settings):
            given["data.heldout"] = 0.0
    file = Path(files[0]) if config and files else None
    return load_config(file, settings, {key: value for key, value in given.items() if value is not None})


def is_setting(word: str) -> bool:
    """Whether a word is section.key=value rather than a file."""
    key, sign, _ = word.partition("=")
    return bool(sign) and key.replace(".", "").replace("_", "").isalpha() and not Path(word).exists()


def share(text: str | None) -> str | float | None:
    """A held-out side as given: a share of the rows, or a file."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def say(line: str) -> None:
    """One line to people."""
    print(visible_lines(line), file=sys.stderr, flush=True)


def put(text: str) -> None:
    """A result to stdout."""
    print(visible_lines(text), flush=True)


def put_json(value: Any) -> None:
    """One JSON document to stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=float) + "\n")
    sys.stdout.flush()


def fail(error: InstilError) -> NoReturn:
    """An InstilError as its lines, and its exit code."""
    for line in error.lines():
        say(line)
    raise typer.Exit(error.exit_code)


@contextmanager
def errors() -> Iterator[None]:
    """Turn what instil raises into lines and exit codes; a bug of ours keeps its traceback and exits 1."""
    try:
        yield
    except InstilError as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped by Ctrl-C; the last checkpoint is untouched")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except MemoryError:
        say("memory: not enough for this; use a smaller model, pack.tokens or batch, or adapter.rank")
        raise typer.Exit(5) from None
    except OSError as error:
        say(f"{error.filename or 'machine'}: {error.strerror or error}; free the resource and run again")
        raise typer.Exit(5) from None


def step_printer() -> Callable[[dict[str, Any], int], None]:
    """on_step for a run: on a terminal one line that is rewritten, else a line every 10 s and at the end."""
    live = sys.stderr.isatty()
    state: dict[str, Any] = {"last": 0.0, "began": time.monotonic(), "first": 0, "targets": 0, "loss": None}

    def on_step(record: dict[str, Any], steps: int) -> None:
        now, step = time.monotonic(), record["step"]
        if not state["first"]:
            state["first"], state["began"] = step, now - record["seconds"]
        state["targets"] += record["target_tokens"]
        loss = record["loss"]
        state["loss"] = loss if state["loss"] is None else 0.9 * state["loss"] + 0.1 * loss
        gone = now - state["began"]
        left = gone / (step - state["first"] + 1) * (steps - step)
        line = (
            f"step {step:,}/{steps:,}  loss {state['loss']:.4f}  {state['targets'] / gone:,.0f} target tokens/s  "
            f"{duration(gone)} gone, {duration(left)} left"
        )
        heldout = record.get("heldout_loss")
        if heldout is not None:
            line += f"  held-out loss {heldout:.4f}"
        done = step == steps
        if live:
            print(f"\r\x1b[2K{line}", end="\n" if done or heldout is not None else "", file=sys.stderr, flush=True)
        elif done or heldout is not None or now - state["last"] >= 10:
            state["last"] = now
            say(line)

    return on_step


def counter(what: str, quiet_s: float = 0.0) -> Callable[[int, int], None]:
    """A progress callback (done, all): a rewritten line on a terminal, a line each time elsewhere.

    quiet_s: what is done sooner than that needs no line.
    """
    began = time.monotonic()

    def tick(done: int, whole: int) -> None:
        gone = time.monotonic() - began
        if gone < quiet_s:
            return
        left = gone / max(1, done) * (whole - done)
        line = f"{what} {done:,}/{whole:,}, {duration(left)} left"
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="\n" if done >= whole else "", file=sys.stderr, flush=True)
        else:
            say(line)

    return tick


def duration(seconds: float) -> str:
    """7 s, 3 min 05 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
