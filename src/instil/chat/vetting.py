"""A stranger's chat template is tried before its first use, in a small child process with limits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from instil import __version__
from instil.errors import MachineError, TemplateError
from instil.types import Message

TIME_LIMIT_S = 2  # of computing; a template has no way to sleep, and waiting would refuse good ones on busy machines
WALL_LIMIT_S = 10  # from the start of the template's code to its end, however busy the machine
START_LIMIT_S = 120  # for Python to start in; slow network disks have been seen to take half a minute
MEMORY_LIMIT_MB = 512  # of address space, beyond what the child has when the template's code starts
OUTPUT_FACTOR, OUTPUT_EXTRA_CHARACTERS = 16, 65_536  # output <= factor * (template + messages) + extra
VETTING = "1"  # part of the cache key: raise it when the trial changes
PASSED = b"passed\n"
REMEDY = "do not use this template; give another with --template FILE"
PROGRAM = (  # with the parent's own search path, so that both run the same code
    "import sys; sys.path[:] = sys.argv[1:];from instil.chat import template, vetting; vetting.child(template.Template)"
)
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")  # no token and no key of the user reaches the child

Result = TypeVar("Result")

# What jinja2 imports only when it is needed has to be there before files are out of reach.
WARM_UP = "{{ strftime_now('%d') }}{{ lipsum(1) }}{{ 'a b'|wordwrap(1) }}{{ 1|pprint }}{{ messages[0].nothing.more }}"
_CALL = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer", "description": "x"}}, "required": ["a"]}
_TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": _PARAMETERS}}]
_TURN = [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "1 + 2 is 3.\n"}]
_SYSTEM = {"role": "system", "content": "You are a calculator."}
_RESULT = {"role": "tool", "name": "add", "tool_call_id": "call12345", "content": "3"}
CONVERSATIONS: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = [
    (_TURN[:1], []),
    ([_SYSTEM, _TURN[0]], []),
    ([*_TURN, _TURN[0]], []),
    ([_TURN[0], {**_TURN[1], "reasoning_content": "Add them."}, _TURN[0]], []),
    ([_SYSTEM, _TURN[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]}, _RESULT, _TURN[1]], _TOOLS),
    (_TURN * 16 + _TURN[:1], []),
]


def vet(source: str, special: Mapping[str, str], place: str) -> None:
    """Raise TemplateError unless `source` renders a few conversations within the limits of time, memory and output.

    A template may refuse conversations or fail on them; whoever renders with it is told then. A template that has
    passed is remembered in the user's cache folder, and not tried again by this version.
    """
    remembered = _remembered_at(source, special)
    if remembered is not None and _has_passed(remembered):
        return
    fault = _try_in_child(source, special, place)
    if fault:
        raise TemplateError.at(place, fault, REMEDY, "template-limits")
    if remembered is not None:
        _remember(remembered)


@contextlib.contextmanager
def time_limit(limit_s: float, place: str) -> Iterator[None]:
    """Raise TemplateError when what is inside computes for longer than limit_s.

    It costs about 15 us, so put it around a batch of renderings rather than around each. It counts the computing
    time of this thread alone and works in the main thread of a process; in other threads it does nothing.
    """
    left_s, interval_s = signal.getitimer(signal.ITIMER_PROF)
    if threading.current_thread() is not threading.main_thread() or 0 < left_s <= limit_s:
        yield  # a limit around this one comes sooner
        return
    started = time.thread_time()

    def expired(_signal: int, _frame: object) -> None:  # the timer counts every thread, and ticks until it is disarmed
        if time.thread_time() - started >= limit_s:
            raise _OutOfTime

    handler = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, limit_s, max(limit_s / 8, 0.01))
    try:
        try:
            yield
        finally:
            later_s = max(left_s - (time.thread_time() - started), 0.001) if left_s else 0
            signal.setitimer(signal.ITIMER_PROF, later_s, interval_s)
    except _OutOfTime:
        what = f"the template used more than {limit_s:g} s"
        raise TemplateError.at(place, what, REMEDY, "template-limits") from None
    finally:
        signal.signal(signal.SIGPROF, handler)


def limited_render(render: Callable[[], Result], limit_s: float, place: str) -> Result:
    """What `render` returns, unless it computes for longer than limit_s: then TemplateError. See time_limit."""
    with time_limit(limit_s, place):
        return render()


class _OutOfTime(BaseException):
    """No Exception, so that no `except Exception` on the way takes it for a fault of the template's."""


# ── the parent's side ────────────────────────────────────────────────────────────────────────────────────────────────


def _try_in_child(source: str, special: Mapping[str, str], place: str) -> str:
    """Which limit the template breaks, in words; "" if none."""
    command = [sys.executable, "-I", "-c", PROGRAM, *filter(os.path.isabs, sys.path)]
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    job = json.dumps({"source": source, "special": dict(special)}).encode()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={**kept, "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        )  # fmt: skip
        with process:
            try:
                report, _ = process.communicate(job, timeout=START_LIMIT_S)
            finally:
                process.kill()
    except (OSError, subprocess.TimeoutExpired) as error:
        what = f"the process that tries the template did not start: {error}"
        raise MachineError.at(place, what, "start again when the machine is less busy", "no-child") from error
    return _judge(process.returncode, report)


def _judge(returncode: int, report: bytes) -> str:
    """The fault that the child reported, or what its death says."""
    if returncode in (-signal.SIGPROF, -signal.SIGXCPU):
        return f"the template used more than {TIME_LIMIT_S} s"
    if returncode == -signal.SIGALRM:
        return f"the template was not done after {WALL_LIMIT_S} s"
    try:
        fault = json.loads(report)["fault"]
    except (ValueError, TypeError, KeyError):
        fault = None
    if returncode == 0 and isinstance(fault, str):
        return fault
    end = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
    return f"the template ended the process in which it was tried ({end})"


def _remembered_at(source: str, special: Mapping[str, str]) -> Path | None:
    """Where it is written that this template has passed; None where the user has no home."""
    judge = [VETTING, sys.version, jinja2.__version__]
    digest = hashlib.sha256(json.dumps([*judge, source, sorted(special.items())]).encode()).hexdigest()
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        home = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return home / "instil" / "vetted" / f"{digest}-{__version__}"


def _has_passed(remembered: Path) -> bool:
    try:
        return remembered.read_bytes() == PASSED
    except OSError:
        return False


def _remember(remembered: Path) -> None:
    """Write it down, whole or not at all; where that fails, the template is tried again next time."""
    with contextlib.suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=remembered.parent)
        try:
            with open(handle, "wb") as file:
                file.write(PASSED)
            os.replace(unfinished, remembered)
        except OSError:
            os.unlink(unfinished)


# ── the child's side ─────────────────────────────────────────────────────────────────────────────────────────────────


def child(make: Callable[..., Any]) -> None:
    """The whole life of the child: read a template from stdin, limit itself, try it, report on stdout.

    make: the class Template, handed in because it imports this module.
    """
    job = json.load(sys.stdin)
    sys.stdin.close()
    _try(make, WARM_UP, {})
    _limit_this_process()
    fault = _try(make, job["source"], job["special"])
    print(json.dumps({"fault": fault}), flush=True)


def _limit_this_process() -> None:
    """Two seconds, 512 MB more, no file, no connection, no process; the signals that end it are not handled."""
    import resource  # not on every system, and needed in the child only

    used = _address_space_bytes()
    if used is not None:
        _lower(resource.RLIMIT_AS, used + MEMORY_LIMIT_MB * 2**20)
    _lower(resource.RLIMIT_CPU, int(time.process_time()) + TIME_LIMIT_S + 1)
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        _lower(kind, 0)
    fatal = {signal.SIGPROF, signal.SIGALRM, signal.SIGXCPU}
    for number in fatal:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, fatal)
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
    signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)


def _lower(kind: int, wanted: int) -> None:
    import resource

    _, hard = resource.getrlimit(kind)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(kind, (limit, limit))


def _address_space_bytes() -> int | None:
    """What this process has now, or None where the system does not tell; there the limit of time must do."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _try(make: Callable[..., Any], source: str, special: Mapping[str, str]) -> str:
    """Which limit the template breaks on some conversation, in words; "" if none."""
    try:
        template = make(source, special, place="template")
    except Exception as error:
        return f"the template used more than {MEMORY_LIMIT_MB} MB" if _came_from(error, MemoryError) else ""
    for messages, tools in CONVERSATIONS:
        for generation_prompt in (False, True):
            fault = _try_rendering(template, messages, tools, generation_prompt)
            if fault:
                return fault
    return ""


def _try_rendering(template: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool) -> str:
    """Which limit this rendering breaks, in words; "" if none, and "" if the template refuses or fails otherwise."""
    input_characters = len(template.source) + len(json.dumps([messages, tools]))
    allowed = OUTPUT_FACTOR * input_characters + OUTPUT_EXTRA_CHARACTERS
    try:
        given = [_message(**fields) for fields in messages]
        written = len(template.render(given, tools=tools, generation_prompt=prompt))
    except Exception as error:
        if _came_from(error, MemoryError):
            return f"the template used more than {MEMORY_LIMIT_MB} MB"
        return "the template calls itself without end" if _came_from(error, RecursionError) else ""
    if written > allowed:
        return f"the template wrote {written:,} characters for {input_characters:,} of input, more than {allowed:,}"
    return ""


def _message(role: str, content: str, **fields: Any) -> Message:
    return Message(role, content, fields)


def _came_from(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an exception of this kind is behind `error`; Template puts its own in front of it."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None
