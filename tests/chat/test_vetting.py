"""A template that takes too much is stopped in a process of its own, and a good one is tried once only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from chat_samples import SHARED
from chat_samples import TEMPLATES as OWN

from instil.chat import vetting
from instil.chat.vetting import limited_render, time_limit, vet
from instil.errors import MachineError, TemplateError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
REAL = sorted((SHARED / "chat_templates").glob("*.jinja"))
ABSENT = pytest.param(None, marks=pytest.mark.skip(reason="the real chat templates are not part of the project"))
FOREVER = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}" + "{% endfor %}" * 3
TOO_MUCH = {
    "nested loops": (FOREVER, "used more than 2 s"),
    "power": ("{{ 9 ** (9 ** 9) }}", "used more than 2 s"),
    "loop in one filter": ("{{ ('a ' * 10**7) | wordwrap(1) }}", "used more than 2 s"),
    "endless lorem ipsum": ("{{ lipsum(n=10**6) | length }}", "used more than 2 s"),
    "loop only with tools": ("{% if tools %}" + FOREVER + "{% endif %}", "used more than 2 s"),
    "giant string": ("{{ 'a' * 10**9 }}", "used more than 512 MB"),
    "giant string of a message": ("{{ messages[0].content * 10**9 }}", "used more than 512 MB"),
    "centred": ("{{ 'a' | center(10**9) }}", "used more than 512 MB"),
    "format": ("{{ '%1000000000d' % 1 }}", "used more than 512 MB"),
    "format method": ("{{ '{:1000000000}'.format(1) }}", "used more than 512 MB"),
    "giant list": ("{{ [1] * 10**9 }}", "used more than 512 MB"),
    "doubling": (
        "{% set n = namespace(x='0123456789') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "used more than 512 MB",
    ),
    "output": ("{% for a in range(99999) %}0123456789{% endfor %}", r"wrote 999,990 characters for \d+ of input"),
    "macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "two macros": (
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
        "calls itself without end",
    ),
    "recursive loop": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "calls itself without end"),
    "block": ("{% block a %}{{ self.a() }}{% endblock %}", "calls itself without end"),
}
ALLOWED = {
    "refuses everything": "{{ raise_exception('No.') }}",
    "fails on everything": "{{ messages[0].nothing.more }}",
    "refuses a system message": "{% if messages[0].role == 'system' %}{{ raise_exception('No.') }}{% endif %}",
    "does not compile": "{% for m in messages %}",
    "is too deep to compile": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "tells the date": "{{ strftime_now('%d %B %Y') }}",
    "repeats itself a little": "{% for m in messages %}{{ m.content * 16 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "instil" / "vetted"


@pytest.fixture
def trials(monkeypatch):
    """A list that grows by one for each child process."""
    started = []

    class Counted(subprocess.Popen):
        def __init__(self, *args, **options):
            started.append(args)
            super().__init__(*args, **options)

    monkeypatch.setattr(vetting.subprocess, "Popen", Counted)
    return started


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_template_that_takes_too_much_is_refused(kind):
    """The error names the template and the limit it broke, and the process that tried it is gone."""
    source, reason = TOO_MUCH[kind]
    with pytest.raises(
        TemplateError, match=rf"^model/t\.jinja: the template {reason}.*; do not use .*--template FILE$"
    ) as e:
        vet(source, SPECIAL, "model/t.jinja")
    assert e.value.exit_code == 4
    assert e.value.problems[0].rule == "template-limits"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("kind", ALLOWED)
def test_a_template_that_only_refuses_or_fails_passes(kind):
    """What a template says to a conversation is its right; whoever renders that conversation is told."""
    vet(ALLOWED[kind], SPECIAL, "t")


@pytest.mark.parametrize("path", REAL or [ABSENT], ids=lambda path: getattr(path, "stem", "none"))
def test_real_templates_pass(path):
    """No template of a real model comes near the limits."""
    vet(path.read_text(encoding="utf-8"), SPECIAL, path.name)


def test_the_trial_is_quick():
    """Best of three, with room for a busy machine (measured 0.15 s alone)."""

    def seconds(n):
        start = time.monotonic()
        vet(OWN["chatml"] + " " * n, SPECIAL, "t")
        return time.monotonic() - start

    assert min(map(seconds, range(3))) < 1


def test_a_good_template_is_tried_once(trials, cache):
    """The second start costs a look at one small file."""
    for _ in range(3):
        vet(OWN["llama3"], SPECIAL, "t")
    assert len(trials) == 1
    assert [path.stat().st_size < 16 for path in cache.iterdir()] == [True]


@pytest.mark.parametrize("change", ["source", "special", "version", "trial", "jinja2", "content", "nothing"])
def test_what_was_tried_is_what_is_remembered(trials, cache, monkeypatch, change):
    """Another source, other special tokens, another version or a damaged file: the template is tried again."""
    vet("{{ bos_token }}", SPECIAL, "t")
    if change == "version":
        monkeypatch.setattr(vetting, "__version__", "99")
    elif change == "trial":
        monkeypatch.setattr(vetting, "VETTING", "99")
    elif change == "jinja2":
        monkeypatch.setattr(vetting.jinja2, "__version__", "99")
    elif change == "content":
        next(cache.iterdir()).write_bytes(b"")
    source = "{{ eos_token }}" if change == "source" else "{{ bos_token }}"
    vet(source, {"bos_token": "B"} if change == "special" else SPECIAL, "t")
    assert len(trials) == (1 if change == "nothing" else 2)


def test_a_refused_template_is_not_remembered(trials, cache):
    """A refusal may have been the machine's fault, so it does not stick."""
    for _ in range(2):
        with pytest.raises(TemplateError):
            vet("{{ 'a' * 10**9 }}", SPECIAL, "t")
    assert len(trials) == 2
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_fault(trials, tmp_path, monkeypatch):
    """Without a place to remember it, the template is tried each time, and nothing is said."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    vet("{{ bos_token }}", SPECIAL, "t")
    vet("{{ bos_token }}", SPECIAL, "t")
    assert len(trials) == 2
    assert (tmp_path / "file").read_text() == ""


ENDS = {
    "import os; os.abort()": "ended the process in which it was tried (SIGABRT)",
    "import os; os._exit(7)": "ended the process in which it was tried (exit code 7)",
    "print('nonsense')": "ended the process in which it was tried (exit code 0)",
    "print('{}')": "ended the process in which it was tried (exit code 0)",
    "import os, signal; os.kill(os.getpid(), signal.SIGALRM)": "was not done after 10 s",
    "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)": "used more than 2 s",
    "import sys, json; sys.stdin.close(); print(json.dumps({'fault': 'early end'}))": "early end",
}


@pytest.mark.parametrize("program", ENDS)
def test_any_end_of_the_child_but_a_good_report_is_a_refusal(monkeypatch, program):
    """A child that crashes, is killed or talks nonsense has not passed its template."""
    monkeypatch.setattr(vetting, "PROGRAM", program)
    with pytest.raises(TemplateError) as e:
        vet("x" * 500_000, SPECIAL, "t")
    assert ENDS[program] in str(e.value)


def test_a_machine_that_cannot_start_the_child_is_named(monkeypatch):
    """That is no fault of the template: exit code 5."""
    monkeypatch.setattr(vetting, "PROGRAM", "import time; time.sleep(60)")
    monkeypatch.setattr(vetting, "START_LIMIT_S", 0.1)
    with pytest.raises(MachineError, match=r"t: the process that tries the template did not start: .*timed out"):
        vet("x", SPECIAL, "t")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(MachineError, match=r"t: the process that tries the template did not start: .*No such file"):
        vet("x", SPECIAL, "t")


def test_no_secret_reaches_the_child(monkeypatch):
    """The child's environment holds neither tokens nor Python's own switches."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    program = "import os, json; print(json.dumps({'fault': ' '.join(os.environ)}))"
    monkeypatch.setattr(vetting, "PROGRAM", program)
    with pytest.raises(TemplateError) as e:
        vet("x", SPECIAL, "t")
    assert "OPENBLAS_NUM_THREADS" in str(e.value)
    assert "HF_TOKEN" not in str(e.value)
    assert "PYTHONSTARTUP" not in str(e.value)


@pytest.mark.parametrize(
    "escape",
    ["open('/etc/hostname')", "open('/tmp/x', 'w')", "socket.socket()", "subprocess.Popen(['true'])", "os.pipe()"],
)
def test_whoever_broke_out_of_the_sandbox_would_find_nothing_to_use(escape):
    """Under the child's limits no file, connection or process can be opened, whatever the code."""
    code = (
        "import socket, subprocess, os; from instil.chat import vetting; vetting._limit_this_process()\n"
        f"try:\n    {escape}\nexcept OSError as error:\n    print(type(error).__name__, error.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "24"]  # EMFILE: no descriptor is left


# ── the limit inside this process ────────────────────────────────────────────────────────────────────────────────────


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


def test_a_rendering_that_computes_too_long_is_stopped():
    """The error comes after the limit, and names limit and template."""
    start = time.thread_time()
    with pytest.raises(TemplateError, match=r"^t: the template used more than 0\.2 s; do not use this template"):
        limited_render(lambda: busy(60), 0.2, "t")
    assert 0.2 <= time.thread_time() - start < 2


def test_no_handler_of_the_template_takes_the_stop_for_its_own(monkeypatch):
    """`except Exception` around the work does not swallow it."""

    def stubborn():
        while True:
            try:
                busy(60)
            except Exception:
                continue

    with pytest.raises(TemplateError, match="used more than"):
        limited_render(stubborn, 0.1, "t")


def test_quick_work_passes_and_leaves_nothing_behind():
    """The value comes back; signal handler and timer are as before, after good and bad ends."""
    before = signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_REAL)[1]
    assert limited_render(lambda: "text", 1, "t") == "text"
    with pytest.raises(ZeroDivisionError), time_limit(1, "t"):
        _ = 1 / 0
    with pytest.raises(TemplateError), time_limit(0.05, "t"):
        busy(60)
    assert (signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_REAL)[1]) == before
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    busy(0.1)


def test_limits_nest():
    """However often limits begin and end inside another, the outer one ends the work."""

    def many_inner():
        while True:
            limited_render(lambda: busy(0.01), 5, "inner")

    start = time.thread_time()
    with pytest.raises(TemplateError, match=r"outer: the template used more than 0\.3 s"):
        limited_render(many_inner, 0.3, "outer")
    assert time.thread_time() - start < 2


def test_a_shorter_limit_inside_another_holds():
    """The inner limit ends its own work, and what comes after still has the outer one."""

    def two_works():
        with pytest.raises(TemplateError, match="inner: "):
            limited_render(lambda: busy(60), 0.05, "inner")
        busy(60)

    with pytest.raises(TemplateError, match="outer: "):
        limited_render(two_works, 0.5, "outer")


def test_the_computing_of_other_threads_does_not_count():
    """A tokenizer at work in the background does not get a template refused."""
    stop = threading.Event()

    def burn():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        with time_limit(0.1, "t"):
            time.sleep(0.5)
    finally:
        stop.set()
        thread.join()


def test_elsewhere_than_in_the_main_thread_there_is_no_limit():
    """Signals reach the main thread only, so that another thread works without."""
    found = []
    thread = threading.Thread(target=lambda: found.append(limited_render(lambda: busy(0.2), 0.05, "t")))
    thread.start()
    thread.join()
    assert found == ["done"]


def test_a_limit_costs_microseconds():
    """Best of five (measured 15 us), for a batch of rows, not for each."""

    def cost():
        start = time.perf_counter()
        for _ in range(1000):
            with time_limit(2, "t"):
                pass
        return (time.perf_counter() - start) / 1000

    assert min(cost() for _ in range(5)) < 100e-6
