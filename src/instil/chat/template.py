"""The model's chat template: messages in, the text that a server would make of them out."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from instil.chat.tokenizer import read_config, read_special
from instil.chat.vetting import vet
from instil.errors import DataError, InstilError, TemplateError
from instil.types import REASONING_FIELDS, Message

SIZE_LIMIT_BYTES = 1_000_000  # the largest real template known to us has 17 kB
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of characters that JSON can hold and UTF-8 cannot
PROBE = "instil asks what comes next"  # a text that no template writes by itself
Sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment
SCALARS = (str, int, float, bool, type(None))


@final
class Template:
    """A chat template, compiled once, in the sandbox and with the variables that transformers gives it.

    place: where the source is. digest: sha256 of the source. today: the date that `strftime_now` tells.
    args: more variables for every rendering (enable_thinking, ...). notices: what a user should know about the file.
    uses_date: whether a rendering has asked for the date so far. content_parts: whether it wants contents as lists of
    parts, [{"type": "text", "text": ...}], and does not take plain text. null_content: whether the empty content beside
    tool calls must be null for the calls to be written (set by endings.py).
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str],
        *,
        place: str,
        today: datetime.date | None = None,
        args: Mapping[str, Any] | None = None,
        notices: tuple[str, ...] = (),
    ):
        self.source = source
        self.special = dict(special)
        self.place = place
        self.today = today if today is not None else datetime.date.today()
        self.args = dict(args or {})
        self.notices = notices
        self.uses_date = False
        self.content_parts = False
        self.null_content = False
        self._constants: list[str] | None = None
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self._compiled = self.compile(Sandbox)
        self._globals = dict(self._compiled.environment.globals)
        self.content_parts = self._wants_parts()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        args: Mapping[str, Any] | None = None,
        generation_prompt: bool,
    ) -> str:
        """The text of `messages`, ending with the header of an answer when generation_prompt is true.

        args: variables of this rendering, over those of the template.
        Raises TemplateError with the template's own message, or with what went wrong in it and on which line.
        """
        with self.naming_faults():
            return "".join(run(self._compiled, self.variables(messages, tools, args, generation_prompt)))

    def variables(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        args: Mapping[str, Any] | None,
        generation_prompt: bool,
    ) -> dict[str, Any]:
        """What a rendering sees."""
        return {
            **self._globals,
            **self.special,
            "messages": [message_data(message, self.content_parts, self.null_content) for message in messages],
            "tools": [_plain(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self.args,
            **(args or {}),
        }

    def _wants_parts(self) -> bool:
        """Plain text is what servers send; parts only where the text does not come through and parts do."""
        question = [Message("user", PROBE)]

        def shows() -> bool:
            try:
                return PROBE in self.render(question, generation_prompt=True)
            except TemplateError:
                return False

        if "content" not in self.source or "text" not in self.source or shows():
            return False
        self.content_parts = True
        return shows()

    @contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Whatever a template raises while it runs, as TemplateError."""
        try:
            yield
        except InstilError:
            raise
        except _Raised as raised:
            what = f"the template refuses these messages: {raised}"
            remedy = "change the messages, or use --template FILE"
            raise TemplateError.at(self.place, what, remedy, "template-raises") from None
        except Exception as error:  # a template is a program of somebody else's: any exception is its fault, not ours
            place = _with_line(self.place, _line_of(error))
            what = f"the template failed: {type(error).__name__}: {error}"
            raise TemplateError.at(place, what, "correct it, or use --template FILE", "template-fails") from error

    def compile(self, sandbox: type[jinja2.sandbox.ImmutableSandboxedEnvironment]) -> jinja2.Template:
        """The source compiled in an environment of this class. Raises TemplateError for a syntax error."""
        environment = sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise, strftime_now=self._strftime_now, dict=_Dict(), namespace=Namespace
        )
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            line = self.source.splitlines()[error.lineno - 1 : error.lineno]
            what = f"the template has a syntax error: {error.message}, in {line[0].strip()!r}" if line else str(error)
            place = _with_line(self.place, error.lineno)
            raise TemplateError.at(place, what, "correct it, or use --template FILE", "template-syntax") from error
        except Exception as error:  # jinja2 accepts what Python then does not compile, such as a break outside a loop
            what = f"the template cannot be compiled: {type(error).__name__}: {error}"
            raise TemplateError.at(self.place, what, "use --template FILE", "template-syntax") from error

    def tree(self) -> jinja2.nodes.Template:
        """The syntax tree of the source."""
        return self._compiled.environment.parse(self.source)

    def constants(self) -> list[str]:
        """Every string that the source holds, in order, once."""
        if self._constants is None:
            found = (node.value for node in self.tree().find_all(jinja2.nodes.Const))
            self._constants = list(dict.fromkeys(value for value in found if isinstance(value, str)))
        return self._constants

    def _strftime_now(self, format: str) -> str:
        self.uses_date = True
        return datetime.datetime.combine(self.today, datetime.time()).strftime(format)


def run(compiled: jinja2.Template, variables: dict[str, Any]) -> Iterator[str]:
    """The pieces of a rendering. `variables` holds the environment's globals too: merging them anew costs as much as
    rendering a short conversation."""
    context = jinja2.runtime.new_context(
        compiled.environment, compiled.name, compiled.blocks, variables, True, None, None
    )
    try:
        yield from compiled.root_render_func(context)
    except Exception:
        compiled.environment.handle_exception()


def load_template(
    folder: Path, override: Path | None = None, today: datetime.date | None = None, name: str | None = None
) -> Template:
    """The template to use for the model in `folder`: the file `override`, or its own template of that name.

    It is a program of somebody else's, so it is tried within limits before anything here compiles it.
    Raises TemplateError when there is none, when it is no text of reasonable size, when it breaks the limits of the
    trial, or when it does not compile.
    """
    source = _from_file(override) if override is not None else _choose(_sources(folder), name, folder)
    special = read_special(folder)
    vet(source.text, special, source.place)
    return Template(source.text, special, place=source.place, today=today, notices=source.notices)


def named_templates(folder: Path) -> dict[str, str]:
    """The model's templates by name; the one used unless another is asked for is `default`. Empty if it has none."""
    return {name: source.text for name, source in _sources(folder).items()}


@dataclass(frozen=True, slots=True)
class _Source:
    """A template's text as it will be compiled, where it is from, and what a user should know about that."""

    text: str
    place: str
    notices: tuple[str, ...] = ()


def _choose(sources: Mapping[str, _Source], name: str | None, folder: Path) -> _Source:
    """The template called `name`, or the default one."""
    wanted = "default" if name is None else name
    if wanted in sources:
        return sources[wanted]
    if sources:
        what = f"no template is named {wanted!r}, only {', '.join(sorted(map(repr, sources)))}"
        remedy = "choose one with --template NAME, or give another with --template FILE"
        raise TemplateError.at(folder, what, remedy, "no-template")
    what = (
        "the model has no chat template: looked for chat_template.jinja, for additional_chat_templates/NAME.jinja, "
        "and for chat_template in tokenizer_config.json and in chat_template.json"
    )
    raise TemplateError.at(folder, what, "give one with --template FILE", "no-template")


def _sources(folder: Path) -> dict[str, _Source]:
    """All templates of a model: its files, else tokenizer_config.json's, as in transformers; else a processor's."""
    beside, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    entry = read_config(folder).get("chat_template")
    found = {"default": _from_file(beside)} if os.path.lexists(beside) else {}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.name.removesuffix(".jinja")] = _from_file(path)
    if not found:
        return _entries(entry, str(config)) or _from_processor(folder / "chat_template.json")
    if isinstance(entry, str) and "default" in found and _lines(entry) != found["default"].text:
        notice = f"{config} holds another template, which is not used: files win, as in transformers"
        found["default"] = _noting(found["default"], notice)
    return found


def _entries(entry: Any, file: str) -> dict[str, _Source]:
    """The templates in a `chat_template` entry: a text, or texts by name as a list or as a mapping."""
    place = f"{file}: chat_template"
    if isinstance(entry, list):
        items = [item for item in entry if isinstance(item, Mapping)]
        entry = {str(item.get("name")): item.get("template") for item in items}
    named = entry if isinstance(entry, Mapping) else {} if entry is None else {"default": entry}
    for name, text in named.items():
        if not isinstance(text, str):
            what = f"the template {name!r} is not text but of type {type(text).__name__}"
            raise TemplateError.at(place, what, "give one with --template FILE", "no-template")
    return {name: _tidy(text, place) for name, text in named.items()}


def _from_processor(path: Path) -> dict[str, _Source]:
    """The templates that older models with images keep for their processor; used where there is no other."""
    if not os.path.lexists(path):
        return {}
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise TemplateError.at(path, f"not JSON: {error}", "give one with --template FILE", "no-template") from error
    entries = _entries(content.get("chat_template") if isinstance(content, Mapping) else None, str(path))
    notice = "this template is a processor's; transformers does not use it for text alone"
    return {name: _noting(source, notice) for name, source in entries.items()}


def _from_file(path: Path) -> _Source:
    """The template that a file holds."""
    try:
        return _tidy(_read(path).decode(), str(path))
    except UnicodeDecodeError as error:
        what = f"the template is not UTF-8: {error}"
        raise TemplateError.at(path, what, "save it as UTF-8", "no-template") from error


def _tidy(text: str, place: str) -> _Source:
    """The text with line ends of one kind, as jinja2 would write them, and without a byte order mark."""
    fault = "" if text.strip("\ufeff \r\n\t") else "is empty"
    fault = "holds NUL or half a character" if NO_TEXT.search(text) else fault
    if fault:
        raise TemplateError.at(place, f"the template {fault}", "give another with --template FILE", "no-template")
    _check_size(len(text.encode()), place)
    source = _Source(_lines(text.removeprefix("\ufeff")), place)
    if text.startswith("\ufeff"):
        source = _noting(source, "the byte order mark at the start was removed; transformers would keep it")
    if "\r" in text:
        source = _noting(source, "line ends other than LF were made LF; what the template renders is the same")
    return source


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _noting(source: _Source, notice: str) -> _Source:
    return replace(source, notices=(*source.notices, notice))


def _read(path: Path) -> bytes:
    """The content of a regular file, within the size limit: a device or a pipe may have no end."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "the template cannot be read: this is not a regular file"
            raise TemplateError.at(path, what, "give a file with --template FILE", "no-template")
        _check_size(status.st_size, str(path))
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        what = f"the template cannot be read: {getattr(error, 'strerror', None) or error}"
        raise TemplateError.at(path, what, "give an existing file with --template FILE", "no-template") from error
    _check_size(len(content), str(path))
    return content


def _check_size(size_bytes: int, place: str) -> None:
    if size_bytes > SIZE_LIMIT_BYTES:
        what = f"the template has {size_bytes:,} bytes, more than {SIZE_LIMIT_BYTES:,}"
        raise TemplateError.at(place, what, "give the right file with --template FILE", "template-size")


def message_data(message: Message, parts: bool = False, null: bool = False) -> dict[str, Any]:
    """A message as the template sees it: no field that is None, and reasoning under each name that templates read."""
    if not message.fields and not parts:
        return {"role": message.role, "content": message.content}
    data = {key: _plain(value) for key, value in message.as_dict().items() if value is not None}
    if parts:
        data["content"] = [{"type": "text", "text": message.content}]
    if null and not message.content and message.fields.get("tool_calls"):
        data["content"] = None
    reasoning = next((data[name] for name in REASONING_FIELDS if name in data), None)
    return data if reasoning is None else {"thinking": reasoning, **data, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A copy made of JSON's own types only, so that a template meets no object with methods of its own."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    what = f"a value of type {type(value).__name__} cannot be shown to a chat template"
    raise DataError.at(
        "messages", what, "use JSON values: text, numbers, true, false, null, lists, objects", "not-json"
    )


class _Raised(Exception):
    """A template called raise_exception."""


def _raise(message: object) -> None:
    raise _Raised(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on it; jinja's own filter would escape HTML and sort the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}...{% endgeneration %}` and renders what is inside: an example needs no marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], inside).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict(...)` and `dict.fromkeys(...)` for templates, without the attributes of a class."""

    def __call__(self, *args: Any, **fields: Any) -> dict[Any, Any]:
        return dict(*args, **fields)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, closed to names that begin with an underscore."""

    def __init__(*args: Any, **fields: Any) -> None:  # no named `self`: `namespace(self=1)` is allowed
        for name in dict(*args[1:], **fields):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _with_line(place: str, line: int | None) -> str:
    """`place:line`, where the place is a file and the line is known."""
    return place if line is None else f"{place}: line {line}" if ": " in place else f"{place}:{line}"


def _line_of(error: BaseException) -> int | None:
    """The line of the template in which an exception was raised; jinja2 writes such lines into the traceback."""
    line, step = None, error.__traceback__
    while step is not None:
        line = step.tb_lineno if step.tb_frame.f_code.co_filename == "<template>" else line
        step = step.tb_next
    return line
