"""What every verb shares: text to people on stderr, errors as lines, progress with ETA, JSON alone on stdout."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from instil.errors import InstilError, masked
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
    named = {word.partition("=")[0] for word in settings}
    for key in sorted(named & {key for key, value in given.items() if value is not None}):
        what = f"{key} is given twice, as a setting and as an option or a file"
        raise UsageError.at(f"{key}=...", what, "keep one of them")
    if file is not None:
        file, place = _of_run(file)
        given |= {key: value for key, value in place.items() if key not in named}
    return load_config(file, settings, {key: value for key, value in given.items() if value is not None})


def _of_run(file: Path) -> tuple[Path, dict[str, str]]:
    """A run folder, or the config.yaml in one: its configuration, and that the run is where the folder is now."""
    from instil.folder import is_run

    file = file / "config.yaml" if file.is_dir() and is_run(file) else file
    if file.name != "config.yaml" or not is_run(file.parent):
        return file, {}
    folder = file.parent
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = folder.resolve()
    return file, {"run.dir": str(folder.parent), "run.name": folder.name}


def is_setting(word: str) -> bool:
    """Whether a word is section.key=value rather than a file."""
    key, sign, _ = word.partition("=")
    named = key.replace(".", "").replace("_", "").isalpha()
    return bool(sign) and named and not os.path.exists(word)  # Path.exists raises where a word is too long for a name


def share(text: str | None) -> str | float | None:
    """A held-out side as given: a share of the rows, or a file."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def say(line: str) -> None:
    """One line to people."""
    _show(visible_lines(masked(line)) + "\n")


def _show(text: str) -> None:
    """To stderr. Where nobody listens any more (a closed terminal, a broken pipe) what runs goes on without words."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w", encoding="utf-8")


def put(text: str) -> None:
    """A result to stdout."""
    _out(visible_lines(masked(text)) + "\n")


def put_json(value: Any) -> None:
    """One JSON document to stdout."""
    _out(json.dumps(value, ensure_ascii=False, default=float) + "\n")


def _out(text: str) -> None:
    """To stdout. Raises BrokenPipeError where nobody listens: the pipe's reader has ended, or the terminal was closed."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):  # EIO is what a terminal that is gone says
            raise
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the interpreter flushes it again when it ends
        raise BrokenPipeError from None


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
    except Terminated:
        say("stopped by SIGTERM; the last checkpoint is untouched, the same command goes on from it")
        raise typer.Exit(143) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except MemoryError:
        _no_memory("")
    except (RuntimeError, ImportError) as error:  # allocators, threads and the loader of libraries say it so
        if not any(words in str(error) for words in NO_MEMORY):
            raise
        asked = str(error).partition("you tried to allocate ")[2].partition(" bytes")[0]
        _no_memory(f" ({int(asked) / 1e9:.3g} GB more were asked for)" if asked.isdigit() else "")
    except OSError as error:
        say(f"{error.filename or 'machine'}: {error.strerror or error}; free the resource and run again")
        raise typer.Exit(5) from None


# "primitive" is what oneDNN says where it gets no memory for a kernel.
NO_MEMORY = (
    "can't allocate memory", "out of memory", "can't start new thread", "failed to map segment", "std::bad_alloc",
    "could not create a primitive",
)  # fmt: skip


class Terminated(BaseException):
    """SIGTERM while there is nothing to save: what is half-written is removed on the way out."""


@contextmanager
def unwinding() -> Iterator[None]:
    """SIGTERM unwinds, as Ctrl-C does; and a terminal that is closed ends nothing. Signals are the caller's afterwards."""

    def end(_number: int, _frame: object) -> None:
        raise Terminated

    handlers: dict[str, Any] = {"SIGTERM": end, "SIGHUP": signal.SIG_IGN}
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_memory(asked: str) -> NoReturn:
    remedy = "use a smaller pack.tokens or model, or adapter.rank; `instil plan` says what a run needs"
    say(f"memory: not enough for this{asked}; {remedy}")
    raise typer.Exit(5) from None


def step_printer() -> Callable[[dict[str, Any], int], None]:
    """on_step for a run: on a terminal one line that is rewritten, else a line every 10 s and at the end."""
    live = _live()
    state: dict[str, Any] = {"last": 0.0, "gone": 0.0, "first": 0, "targets": 0, "loss": None}

    def on_step(record: dict[str, Any], steps: int) -> None:
        now, step = time.monotonic(), record["step"]
        state["first"] = state["first"] or step
        state["gone"] += record["seconds"]  # without what the process slept through
        state["targets"] += record["target_tokens"]
        loss = record["loss"]
        state["loss"] = loss if state["loss"] is None else 0.9 * state["loss"] + 0.1 * loss
        gone = max(state["gone"], 1e-9)
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
            _show(f"\r\x1b[2K{_narrow(line)}" + ("\n" if done or heldout is not None else ""))
        elif done or heldout is not None or now - state["last"] >= 10:
            state["last"] = now
            say(line)

    return on_step


def _live() -> bool:
    """Whether a line can be written over: on a terminal that knows the sequence for it."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def _narrow(line: str) -> str:
    """What fits into one line of the terminal, so that it can be written over."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: the terminal does not say
    except (OSError, ValueError):
        columns = 80
    return line[: max(8, columns - 1)]


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
        if _live():
            _show(f"\r\x1b[2K{_narrow(line)}" + ("\n" if done >= whole else ""))
        else:
            say(line)

    return tick


def duration(seconds: float) -> str:
    """7 s, 3 min 05 s, 2 h 10 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"
