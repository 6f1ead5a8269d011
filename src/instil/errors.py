"""What can go wrong, as exceptions: each says where, what, which value and what to do, and knows its exit code.

InstilError                 1  a bug of ours, if ever raised bare
├── UsageError              2  command line or configuration
├── DataError               3  the user's data
├── ModelError              4  model, tokenizer
│   └── TemplateError       4  chat template
├── MachineError            5  disk, memory, permission, lock, device
├── DivergedError           6  non-finite loss or gradient
└── Stopped           130/143  Ctrl-C / SIGTERM, after a verified save
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What looks like a credential: tokens of well-known services by their prefixes, a password in an address, a key in a query.
# Group 1 is what may be shown. Long digits-and-letters are asked for, so that `sk-learn-data` stays a file's name.
SECRET = re.compile(
    r"(?<![A-Za-z0-9])(hf_|api_org_)[A-Za-z0-9]{16,}"
    r"|(?<![A-Za-z0-9])(sk-)(?:[a-z0-9]+-){0,2}(?=[A-Za-z_]*[0-9])[A-Za-z0-9_]{16,}[\w-]*"
    r"|(?<![A-Za-z0-9])(gh[pousr]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}"
    r"|(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    r"|(\b[A-Za-z][A-Za-z0-9+.-]{0,31}://)[^\s/?#:@'\"]*:[^\s/?#'\"]*(?=@)"
    r"|([?&](?i:access_token|token|api_?key|password|secret|sig|signature|x-amz-signature)=)[^&\s'\"]+",
)
SHOWN_PER_KIND = 20  # problems of one rule that are printed before only their count is


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: `place: what; remedy`.

    place: `file:line: field`, a configuration key, or a path. rule: a short slug shared by problems of one kind.
    """

    place: str
    what: str
    remedy: str
    rule: str = "invalid"

    def __str__(self) -> str:
        return masked(f"{self.place}: {self.what}; {self.remedy}" if self.remedy else f"{self.place}: {self.what}")


def masked(text: str) -> str:
    """`text` with *** for what looks like a credential: every text that leaves for a terminal or a log goes through here."""
    return SECRET.sub(lambda found: "".join(part or "" for part in found.groups()) + "***", text)


class InstilError(Exception):
    """Base of everything instil raises on purpose; carries one or more problems."""

    exit_code = 1

    def __init__(self, *problems: Problem):
        self.problems = problems
        super().__init__("\n".join(self.lines()))

    @classmethod
    def at(cls, place: object, what: str, remedy: str, rule: str = "invalid") -> InstilError:
        """The error for a single problem."""
        return cls(Problem(str(place), what, remedy, rule))

    def lines(self) -> list[str]:
        """The problems as text, one line each: at most SHOWN_PER_KIND of a rule, then how many more there are."""
        return problem_lines(self.problems)


class UsageError(InstilError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class DataError(InstilError):
    """The user's data is wrong."""

    exit_code = 3


class ModelError(InstilError):
    """The model or tokenizer cannot be used."""

    exit_code = 4


class TemplateError(ModelError):
    """The chat template cannot be used."""


class MachineError(InstilError):
    """The machine refuses: disk, memory, permission, lock or device."""

    exit_code = 5


class DivergedError(InstilError):
    """Training produced a non-finite loss or gradient; the update was not applied."""

    exit_code = 6


class Stopped(InstilError):
    """A signal ended the run after a verified save. exit_code is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, problem: Problem, exit_code: int):
        super().__init__(problem)
        self.exit_code = exit_code


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Problems as lines, in order: at most SHOWN_PER_KIND of each rule, then one line with the count of the rest."""
    shown: dict[str, int] = {}
    lines = []
    for problem in problems:
        shown[problem.rule] = shown.get(problem.rule, 0) + 1
        if shown[problem.rule] <= SHOWN_PER_KIND:
            lines.append(str(problem).replace("\n", " "))
    lines += [
        f"... and {n - SHOWN_PER_KIND} more of this kind ({rule})" for rule, n in shown.items() if n > SHOWN_PER_KIND
    ]
    return lines
