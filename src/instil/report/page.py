"""A run folder's page: report.html, self-contained, without scripts, made from the files of the folder alone."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from instil.errors import MachineError
from instil.files import write_atomically
from instil.report import sections
from instil.report.escape import visible_lines
from instil.report.evidence import Evidence, read_evidence


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder, finished or not; returns its path. Equal folders give equal pages.

    Raises UsageError where `folder` is no run folder, MachineError where it cannot be read or written.
    """
    page = folder / "report.html"
    write_page(page, _render(read_evidence(folder)).encode())
    return page


def _render(evidence: Evidence) -> str:
    """The page as text."""
    source = files("instil.report").joinpath("page.html").read_text(encoding="utf-8")
    return (
        page_environment()
        .from_string(source)
        .render(
            evidence=evidence,
            version=sections.inside(evidence.manifest, "versions").get("instil", ""),
            cards=sections.headline(evidence),
            loss=sections.loss_panel(evidence),
            panels=sections.small_panels(evidence),
            bar=sections.row_bar(evidence),
            account=sections.account(evidence),
            imbalances=sections.imbalances(evidence),
            rules=sections.rules(evidence),
            learnt=sections.learnt(evidence),
            certificates=sections.certificates(evidence),
            digests=sections.digests(evidence),
            machine=sections.machine(evidence),
            config=[_setting(line) for line in evidence.config.rstrip("\n").split("\n")],
        )
    )


def page_environment() -> Environment:
    """Autoescape and `_safe` see every value that is no Markup, so that nothing from data is markup."""
    return Environment(autoescape=True, undefined=StrictUndefined, finalize=_safe, trim_blocks=True, lstrip_blocks=True)


def _safe(value: Any) -> Any:
    """Control characters and bidi overrides written out; HTML's own characters are autoescape's task."""
    return visible_lines(value) if type(value) is str else value


def _setting(line: str) -> tuple[str, str]:
    """A line of config.yaml as (setting, comment)."""
    if line.lstrip().startswith("#"):
        return "", line
    setting, sign, comment = line.rpartition("  # ")
    return (setting, sign + comment) if sign else (line, "")


def write_page(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never between. Raises MachineError where it cannot be written."""
    try:
        write_atomically(path, data)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise MachineError.at(path, what, "free space or fix the permissions", "unwritable") from None
