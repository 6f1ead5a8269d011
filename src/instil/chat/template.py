"""The model's chat template: messages in, the text that a server would make of them out."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from instil.chat.tokenizer import read_config, read_special
from instil.errors import DataError, TemplateError
from instil.types import REASONING_FIELDS, Message

SIZE_LIMIT_BYTES = 1_000_000  # the largest real template known to us has 17 kB
SCALARS = (str, int, float, bool, type(None))


@final
class Template:
    """A chat template, compiled once, in the sandbox and with the variables that transformers gives it.

    place: where the source is. digest: sha256 of the source. today: the date that `strftime_now` tells.
    uses_date: whether a rendering has asked for the date so far.
    """

    def __init__(self, source: str, special: Mapping[str, str], *, place: str, today: datetime.date | None = None):
        self.source = source
        self.special = dict(special)
        self.place = place
        self.today = today if today is not None else datetime.date.today()
        self.uses_date = False
        self.digest = hashlib.sha256(source.encode()).hexdigest()
        self._compiled = self._compile()

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), generation_prompt: bool
    ) -> str:
        """The text of `messages`, ending with the header of an answer when generation_prompt is true.

        Raises TemplateError with the template's own message, or with what went wrong in it and on which line.
        """
        variables = {
            **self.special,
            "messages": [_message_data(message) for message in messages],
            "tools": [_plain(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": generation_prompt,
        }
        try:
            return self._compiled.render(variables)
        except _Raised as raised:
            what = f"the template refuses these messages: {raised}"
            remedy = "change the messages, or use --template FILE"
            raise TemplateError.at(self.place, what, remedy, "template-raises") from None
        except Exception as error:  # a template is a program of somebody else's: any exception is its fault, not ours
            place = _with_line(self.place, _line_of(error))
            what = f"the template failed: {type(error).__name__}: {error}"
            raise TemplateError.at(place, what, "correct it, or use --template FILE", "template-fails") from error

    def _compile(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(
            raise_exception=_raise, strftime_now=self._strftime_now, dict=_Dict(), namespace=_Namespace
        )
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            line = self.source.splitlines()[error.lineno - 1 : error.lineno]
            what = f"the template has a syntax error: {error.message}, in {line[0].strip()!r}" if line else str(error)
            place = _with_line(self.place, error.lineno)
            raise TemplateError.at(place, what, "correct it, or use --template FILE", "template-syntax") from error
        except (RecursionError, OverflowError, ValueError) as error:
            what = f"the template cannot be compiled: {type(error).__name__}: {error}"
            raise TemplateError.at(self.place, what, "use --template FILE", "template-syntax") from error

    def _strftime_now(self, format: str) -> str:
        self.uses_date = True
        return datetime.datetime.combine(self.today, datetime.time()).strftime(format)


def load_template(folder: Path, override: Path | None = None, today: datetime.date | None = None) -> Template:
    """The template to use for the model in `folder`: `override`, or chat_template.jinja, or tokenizer_config.json's.

    Raises TemplateError when there is none, when it is too big, or when it does not compile.
    """
    beside = folder / "chat_template.jinja"
    if override is not None:
        source, place = _read(override), str(override)
    elif beside.is_file():
        source, place = _read(beside), str(beside)
    else:
        place = f"{folder / 'tokenizer_config.json'}: chat_template"
        source = _from_config(read_config(folder).get("chat_template"), folder, place)
        _check_size(len(source.encode()), place)
    return Template(source, read_special(folder), place=place, today=today)


def _from_config(entry: Any, folder: Path, place: str) -> str:
    """The source in a `chat_template` entry: a string, or named templates of which `default` is taken."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, Mapping)}
    if isinstance(entry, Mapping) and entry:
        if isinstance(entry.get("default"), str):
            return entry["default"]
        what = f"no template is named 'default', only {', '.join(sorted(map(repr, entry)))}"
        raise TemplateError.at(place, what, "save the one to use and give it with --template FILE", "no-template")
    what = (
        "the model has no chat template: looked for chat_template.jinja and for chat_template in tokenizer_config.json"
    )
    raise TemplateError.at(folder, what, "give one with --template FILE", "no-template")


def _read(path: Path) -> str:
    """A template file's text, within the size limit."""
    try:
        _check_size(path.stat().st_size, str(path))
        return path.read_bytes().decode()
    except OSError as error:
        what = f"the template cannot be read: {error.strerror}"
        raise TemplateError.at(path, what, "give an existing file with --template FILE", "no-template") from error
    except UnicodeDecodeError as error:
        raise TemplateError.at(
            path, f"the template is not UTF-8: {error}", "save it as UTF-8", "no-template"
        ) from error


def _check_size(size_bytes: int, place: str) -> None:
    if size_bytes > SIZE_LIMIT_BYTES:
        what = f"the template has {size_bytes:,} bytes, more than {SIZE_LIMIT_BYTES:,}"
        raise TemplateError.at(place, what, "give the right file with --template FILE", "template-size")


def _message_data(message: Message) -> dict[str, Any]:
    """A message as the template sees it: no field that is None, and reasoning under each name that templates read."""
    data = {key: _plain(value) for key, value in message.as_dict().items() if value is not None}
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


class _Namespace(jinja2.utils.Namespace):
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
