"""A tokenizer's regexes that are not well known are tried on hard texts, in a child process with limits, before use."""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import tokenizers

from instil.chat.splitter import GPT2
from instil.errors import MachineError, ModelError

LENGTHS = (250, 1_000, 4_000, 16_000)  # characters of the hard texts; a good regex takes milliseconds for the longest
TEXT_LIMIT_S = 0.25  # of computing for one; time that grows with the square of the length is far beyond it
CPU_LIMIT_S = 10  # for all regexes together
START_LIMIT_S = 120  # for the child to start and end in, on a busy machine
PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from instil.chat import regexes; regexes.child()"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K_END = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
WELL_KNOWN = {
    GPT2,
    _LLAMA3,
    _LLAMA3.replace("{1,3}", ""),  # Qwen2, Qwen3
    _LLAMA3.replace("{1,3}", "").replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"\s\p{L}\p{N}", r"\s\p{L}\p{M}\p{N}"),
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}{_SHORT}|{_O200K_END}",  # gpt-oss, Llama 4
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}|{_O200K_END}".replace("{1,3}", ""),  # tekken
    r"\p{N}",
    r"\p{N}{1,3}",  # DeepSeek V3, with the next two
    "[一-龥\u3040-ゟ゠-ヿ]+",
    _DEEPSEEK,
    _DEEPSEEK.replace(r"\r", "\r").replace(r"\n", "\n"),  # as its file has it
    " {2,}",  # normalisers made from sentencepiece models
}


def vet(backend: tokenizers.Tokenizer, place: str) -> None:
    """Raise ModelError if a regex of the tokenizer takes too long for a hard text, or fails on it.

    Code in the regex engine cannot be interrupted, so this happens in another process, and only for regexes that are
    not well known. It shows what is badly wrong; it cannot prove that no text is slow.
    """
    unknown = sorted(set(regexes(backend)) - WELL_KNOWN)
    if not unknown:
        return
    returncode, report = _in_child(unknown, place)
    lines = report.decode("utf-8", "replace").splitlines()
    faults = [json.loads(line) for line in lines if line.startswith("{")]
    if returncode != 0 and not faults:
        tried = unknown[min(len(lines), len(unknown)) - 1] if lines else unknown[0]
        end = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
        faults = [{"regex": tried, "what": f"ended the process in which it was tried ({end})"}]
    if faults:
        regex, what = faults[0]["regex"], faults[0]["what"]
        remedy = "do not use this tokenizer, or ask its authors to mend the regex"
        raise ModelError.at(place, f"the regex {_short(regex)} {what}", remedy, "tokenizer-limits")


def regexes(backend: tokenizers.Tokenizer) -> Iterator[str]:
    """Every regex in a tokenizer's normaliser, pre-tokenizer and decoder."""
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        if part is not None:
            yield from _inside(json.loads(part.__getstate__()))


def _inside(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for item in value.values():
            yield from _inside(item)
    elif isinstance(value, list):
        for item in value:
            yield from _inside(item)


def _in_child(unknown: list[str], place: str) -> tuple[int, bytes]:
    """How the child ended and what it wrote."""
    command = [sys.executable, "-I", "-c", PROGRAM, *filter(os.path.isabs, sys.path)]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
            env={"PYTHONUTF8": "1", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )  # fmt: skip
        with process:
            try:
                report, _ = process.communicate(json.dumps(unknown).encode(), timeout=START_LIMIT_S)
            finally:
                process.kill()
    except (OSError, subprocess.TimeoutExpired) as error:
        what = f"the process that tries its regexes did not start or end: {error}"
        raise MachineError.at(place, what, "start again when the machine is less busy", "no-child") from error
    return process.returncode, report


# ── the child's side ─────────────────────────────────────────────────────────────────────────────────────────────────


def child() -> None:
    """Try the regexes that come on stdin; a line for each begun, and one with the first fault."""
    import resource  # not on every system, and needed in the child only

    unknown = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for regex in unknown:
        print("try", flush=True)
        what = fault(regex)
        if what:
            print(json.dumps({"regex": regex, "what": what}), flush=True)
            return


def fault(regex: str) -> str:
    """What is wrong with a regex as the hard texts show it; "" if nothing is."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    hard = [text for length in LENGTHS for text in hard_texts(regex, length)]  # short ones first: they fail soonest
    for unit, text in hard:
        began = time.process_time()
        try:
            split.pre_tokenize_str(text)
        except BaseException as error:  # the library panics, which is no Exception, when the engine gives up
            return f"fails on {len(text):,} characters of {unit!r} ({str(error)[:80]})"
        used = time.process_time() - began
        if used > TEXT_LIMIT_S:
            return f"takes {used:.1f} s for {len(text):,} characters of {unit!r}, and grows faster than the text"
    return ""


def hard_texts(regex: str, length: int) -> Iterator[tuple[str, str]]:
    """(unit, text): one or two characters many times over, with an end that lets a long match fail.

    The characters are those that words are made of, and those that the regex itself names.
    """
    named = [char for char in dict.fromkeys(regex) if char in string.ascii_letters + string.digits][:16]
    units = [" ", "\n", "\t", "a", "A", "1", "'", "!", "é", "東", "aA", "a ", " \n", "a1", "ab", *named]
    for unit in dict.fromkeys(units):
        for end in ("", "!", "x", "\0"):
            yield unit, unit * (length // len(unit)) + end


def _short(regex: str) -> str:
    shown = " ".join(regex.encode("ascii", "backslashreplace").decode().split())
    return shown if len(shown) <= 60 else shown[:57] + "..."
