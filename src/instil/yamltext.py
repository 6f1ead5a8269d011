"""YAML 1.2 from outside in, plain values and their lines out; tags, second documents and what would grow are refused."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import RoundTripConstructor, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    NodeEvent,
    ScalarEvent,
)

from instil.errors import UsageError

# Of a configuration; nodes are counted with aliases written out.
MOST_BYTES, MOST_NODES, MOST_DEPTH = 1_000_000, 10_000, 40
TIMESTAMP = "tag:yaml.org,2002:timestamp"
MEND = "mend the YAML"


class _WithLines(RoundTripConstructor):
    """ruamel's reader that knows lines; YAML 1.2 has no dates, so 2024-01-02 is text."""


class _Plain(SafeConstructor):
    """ruamel's reader of plain values; YAML 1.2 has no dates, so 2024-01-02 is text."""


for _reader in (_WithLines, _Plain):
    _reader.add_constructor(TIMESTAMP, lambda _self, node: node.value)


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file as nested dicts, and `file:line` of every key. Raises UsageError with `file:line:column`."""
    text = _text(file)

    def place(mark: Any) -> str:
        return f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)

    tree = _loaded(text, "rt", _WithLines, place)
    if not isinstance(tree, CommentedMap):
        raise UsageError.at(file, "is not a mapping of keys", "write for instance `model: demo`")
    places: dict[str, str] = {}

    def plain(node: Any, prefix: str, line: int) -> Any:
        if isinstance(node, CommentedMap):
            lines = {key: node.lc.data[key][0] if key in (node.lc.data or {}) else line for key in node}
            places.update({f"{prefix}{key}": f"{file}:{lines[key] + 1}" for key in node})
            return {str(key): plain(value, f"{prefix}{key}.", lines[key]) for key, value in node.items()}
        if isinstance(node, list):
            return [plain(value, prefix, line) for value in node]
        return _builtin(node)

    return plain(tree, "", 0), places


def read_value(text: str, place: str) -> Any:
    """One value by the rules of YAML 1.2. place: what errors begin with."""
    return _loaded(text, "safe", _Plain, lambda _mark: place)


def _text(file: Path) -> str:
    """A regular file's text, within the limit: a device or a pipe may have no end."""
    override = "an override is written section.key=value, for instance train.lr=2e-5"
    remedy = "check the path" if file.suffix in (".yaml", ".yml") else override
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            kind = "Is a directory" if file.is_dir() else "not a regular file"
            raise UsageError.at(file, f"cannot be read ({kind})", remedy)
        with file.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UsageError.at(file, f"cannot be read ({getattr(error, 'strerror', None) or error})", remedy) from None
    if len(content) > MOST_BYTES:
        what = f"has {file.stat().st_size:,} bytes, and a configuration has at most {MOST_BYTES:,}"
        raise UsageError.at(file, what, "give the configuration; rows of data go into data.train as a file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError.at(file, "is not UTF-8 text", "save it as UTF-8") from None
    before, odd, _ = text.partition("\0")
    if odd:
        place = f"{file}:{before.count(chr(10)) + 1}:{len(before.rpartition(chr(10))[2]) + 1}"
        raise UsageError.at(place, "a NUL character", "save it as plain text")
    return text


def _loaded(text: str, kind: str, constructor: type[SafeConstructor], place: Callable[[Any], str]) -> Any:
    try:
        _refuse_growth(text, place)
        reader = YAML(typ=kind, pure=True)
        reader.Constructor = constructor
        with warnings.catch_warnings():  # of anchors named twice, which YAML allows
            warnings.simplefilter("ignore")
            return reader.load(text)
    except UsageError:
        raise
    except MarkedYAMLError as error:
        what = str(error.problem or error.context or "not YAML").splitlines()[0]
        _refuse(place(error.problem_mark), what)
    except ValueError:  # Python reads no number of more than 4,300 digits
        _refuse(place(None), "a number that is too long to be one")
    except (YAMLError, RecursionError) as error:
        _refuse(place(None), str(error).splitlines()[0])
    except Exception as error:  # a mapping as a key, and whatever else ruamel does not expect (found by fuzzing)
        _refuse(place(None), f"cannot be understood ({type(error).__name__}: {error})")


def _refuse_growth(text: str, place: Callable[[Any], str]) -> None:
    """Raise UsageError for tags, directives, a second document, and for more nodes or levels than a configuration has.

    An alias counts as all that it stands for: nine lists of nine aliases each would be 10^9 values.
    """
    sizes: dict[str, int] = {}  # by anchor, of nodes that are complete
    open_nodes: list[tuple[str | None, int]] = []
    nodes = documents = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        here = event.start_mark
        if isinstance(event, DocumentStartEvent):
            documents += 1
            if documents > 1:
                _refuse(place(here), "a second document begins here", "keep one document in the file")
            if event.version or event.tags:
                _refuse(place(here), "a YAML directive", "leave it out: configurations are YAML 1.2")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag is not None:
            _refuse(place(here), f"the tag {event.tag!r} is not read: values are plain", "leave the tag out")
        if isinstance(event, CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = nodes - before + 1
        elif isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                _refuse(place(here), f"*{event.anchor} stands for nothing before it, or for itself")
            nodes += sizes[event.anchor]
        elif isinstance(event, NodeEvent):
            nodes += 1
            if isinstance(event, CollectionStartEvent):
                open_nodes.append((event.anchor, nodes))
            elif event.anchor:
                sizes[event.anchor] = 1
        if nodes > MOST_NODES:
            _refuse(place(here), f"more than {MOST_NODES:,} values up to here, with aliases (*name) written out")
        if len(open_nodes) > MOST_DEPTH:
            _refuse(place(here), f"more than {MOST_DEPTH} levels")


def _refuse(place: str, what: str, remedy: str = MEND) -> NoReturn:
    raise UsageError.at(place, what, remedy, "yaml")


def _builtin(value: Any) -> Any:
    """ruamel's number and string classes as Python's own."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
