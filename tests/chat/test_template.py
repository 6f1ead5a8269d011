"""A template renders byte for byte what transformers renders, and refuses with a place and a reason."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json

import pytest
from packaging.version import Version

from instil.chat.template import SIZE_LIMIT_BYTES, Template, load_template
from instil.errors import DataError, TemplateError
from instil.types import Message

USER, ANSWER = Message("user", " Größe <b>&'\"\\ 👋?\n"), Message("assistant", "[[1,2],[3,4]]\n")
SYSTEM = Message("system", "Be kind.")
# Before 5.23 transformers itself handed on reasoning under one name only, and its sandbox had other rules; ours are the newer.
OLDER = (
    "older transformers render this otherwise"
    if Version(importlib.metadata.version("transformers")) < Version("5.23")
    else ""
)
PARAMETERS = {"type": "object", "properties": {"who": {"type": "string", "description": "name"}}, "required": ["who"]}
TOOLS = [{"type": "function", "function": {"name": "grüße", "description": "Say <hi>", "parameters": PARAMETERS}}]
CALL = {"id": "call12345", "type": "function", "function": {"name": "grüße", "arguments": {"who": "Änne"}}}
CONVERSATIONS = {
    "one turn": ([USER, ANSWER], []),
    "system": ([SYSTEM, USER, ANSWER, USER], []),
    "reasoning": ([USER, Message("assistant", "So.", {"reasoning": "Why?", "name": None}), USER], []),
    "tools": (
        [USER, Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "ok", {"name": "grüße"})],
        TOOLS,
    ),
}


def chat(template, messages):
    """The messages as a server is sent them: contents in parts where the template wants that."""
    parts = template is not None and template.content_parts
    return [
        message.as_dict() | ({"content": [{"type": "text", "text": message.content}]} if parts else {})
        for message in messages
    ]


def both(folder, oracle, source, messages, tools, generation_prompt):
    """The rendering, or None where it is refused: ours and transformers'."""
    template = None
    try:
        template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, place="t")
        ours = template.render(messages, tools=tools, generation_prompt=generation_prompt)
    except TemplateError:
        ours = None
    try:
        theirs = oracle.apply_chat_template(
            chat(template, messages),
            tools=list(tools) or None,
            chat_template=source,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
    except Exception:
        theirs = None
    return ours, theirs


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_real_templates_render_as_in_transformers(shared_templates, chatml, oracle, kind, generation_prompt):
    """Each real template gives the same bytes as transformers, or is refused by both."""
    if kind == "reasoning" and OLDER:
        pytest.skip(OLDER)
    tokenizer, rendered = oracle(chatml), 0
    messages, tools = CONVERSATIONS[kind]
    for path in sorted(shared_templates.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        ours, theirs = both(chatml, tokenizer, source, messages, tools, generation_prompt)
        assert ours == theirs, path.name
        rendered += ours is not None
    assert rendered >= 25


def test_contents_become_parts_only_where_text_alone_is_lost(shared_templates, chatml):
    """LLaVA's template wants lists of parts; every other real template that renders takes plain text."""
    wanting = []
    for path in sorted(shared_templates.glob("*.jinja")):
        template = Template(path.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"}, place="t")
        wanting += [path.stem] if template.content_parts else []
    assert wanting == ["llava_next"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.role }}{# no content, no text #}{% endfor %}", False),
    ],
)
def test_content_parts_are_found_out_by_trying(source, parts):
    """A template gets plain text unless the text does not come through and parts do."""
    template = Template(source, {}, place="t")
    assert template.content_parts == parts
    assert ("hello" in template.render([Message("user", "hello")], generation_prompt=True)) == ("m.content" in source)


def test_own_templates_render_as_in_transformers(folder, oracle):
    """The template is found in the folder and gets the folder's special tokens."""
    ours = load_template(folder).render([SYSTEM, USER, ANSWER, USER], generation_prompt=True)
    chat = [message.as_dict() for message in (SYSTEM, USER, ANSWER, USER)]
    assert ours == oracle(folder).apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


RENDERED = [
    "{% generation %}{{ messages[0].content }}{% endgeneration %}|",
    "{% set n = namespace(self=1) %}{% generation %}{% set x = 2 %}{% set n.a = 3 %}{% endgeneration %}{{ x, n.a }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "  {% if true %}\n  yes\n  {% endif %}\n{{ dict(a=1)|tojson }}{{ {'b': '<é>', 'a': [1]}|tojson(indent=2) }}",
    "{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}{{ tools }}{{ documents is none }}",
    "{{ messages[1].thinking }}{{ messages[1].reasoning_content }}{{ bos_token }}{{ pad_token is defined }}\r\nx\n\n",
    "{{ strftime_now('%d %b %Y') }}{{ dict.fromkeys([1]) }}{{ messages[1].name is defined }}",
]
REFUSED = [
    "{{ messages.append(1) }}",
    "{% set n = namespace(_a=1) %}",
    "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__ }}",
    "{{ messages[0].nothing.more }}",
    "{{ range(10000000) | length }}",
]


OTHERS_IN_OLDER = {RENDERED[5], RENDERED[6], *REFUSED[1:3]}


@pytest.mark.parametrize("source", RENDERED + REFUSED)
def test_language_of_templates_is_that_of_transformers(chatml, oracle, source):
    """Extensions, filters, variables and the sandbox's refusals are the same as in transformers."""
    if source in OTHERS_IN_OLDER and OLDER:
        pytest.skip(OLDER)
    messages = [USER, Message("assistant", "x", {"reasoning": "because", "name": None})]
    ours, theirs = both(chatml, oracle(chatml), source, messages, [], True)
    assert ours == theirs
    assert (ours is None) == (source in REFUSED)


def test_date_is_fixed_and_noticed():
    """A template that asks for the date is told the given one, and says that it asked."""
    messages, date = [USER], datetime.date(2025, 1, 31)
    dated = Template("{{ strftime_now('%d %B %Y %H:%M') }}", {}, place="t", today=date)
    assert not dated.uses_date
    assert dated.render(messages, generation_prompt=True) == "31 January 2025 00:00"
    assert dated.uses_date
    plain = Template("{{ messages[0].content }}", {}, place="t", today=date)
    plain.render(messages, generation_prompt=True)
    assert not plain.uses_date


def test_override_wins_then_the_file_then_the_configuration(make_folder, tmp_path):
    """The template is the one given, else chat_template.jinja, else the entry of tokenizer_config.json."""
    folder = make_folder(
        "file", chat_template=[{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    )
    override = tmp_path / "mine.jinja"
    override.write_bytes("eigene Größe\r\n".encode())
    assert load_template(folder, override).render([USER], generation_prompt=True) == "eigene Größe"
    text = override.read_bytes().replace(b"\r\n", b"\n")  # line ends of one kind, whatever the file has
    assert load_template(folder, override).digest == hashlib.sha256(text).hexdigest()
    assert load_template(folder, None).source == "file"
    (folder / "chat_template.jinja").unlink()
    assert load_template(folder, None).source == "D"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "S", "eos_token": "E"}))
    assert load_template(folder, None).source == "S"


def test_no_default_among_named_templates_lists_the_names(make_folder):
    """Named templates without a default are refused with their names."""
    folder = make_folder(chat_template=[{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}])
    with pytest.raises(TemplateError, match=r"no template is named 'default', only 'rag', 'tool_use'.*--template FILE"):
        load_template(folder, None)


def test_no_template_says_how_to_give_one(make_folder):
    """A base model without template is refused with the option that gives it one."""
    with pytest.raises(TemplateError, match=r"no chat template: looked for .*--template FILE"):
        load_template(make_folder(), None)


def test_syntax_error_names_the_line(make_folder):
    """A template that does not compile is refused with file, line and text."""
    folder = make_folder("first\n{% for m in messages %}\n{{ m.content | nofilter }}{% endfor %}")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja:3: .*nofilter"):
        load_template(folder, None)


def test_failure_names_the_line(make_folder):
    """A template that fails while rendering is refused with the line on which it did."""
    template = load_template(make_folder("first\n\n{{ messages[0].nothing.more }}"), None)
    with pytest.raises(TemplateError, match=r"chat_template\.jinja:3: the template failed: UndefinedError"):
        template.render([USER], generation_prompt=True)


def test_the_templates_own_message_is_passed_on():
    """What a template says through raise_exception is what the user reads."""
    template = Template("{{ raise_exception('Roles must alternate!') }}", {}, place="t.jinja")
    with pytest.raises(TemplateError, match=r"t\.jinja: the template refuses these messages: Roles must alternate!"):
        template.render([USER], generation_prompt=True)


def test_files_that_are_no_template_are_refused(chatml, tmp_path):
    """A missing, oversized or binary file is refused by its path before it is compiled."""
    big, binary = tmp_path / "big.jinja", tmp_path / "binary.jinja"
    big.write_bytes(b"x" * (SIZE_LIMIT_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in ((big, "1,000,001 bytes"), (binary, "UTF-8"), (tmp_path / "none.jinja", "cannot be read")):
        with pytest.raises(TemplateError, match=rf"{path.name}: .*{reason}"):
            load_template(chatml, path)


def test_only_json_values_reach_a_template():
    """A value with methods of its own is refused, as a template could call them."""
    template = Template("{{ messages }}", {}, place="t")
    with pytest.raises(DataError, match="a value of type date cannot be shown"):
        template.render([Message("user", "x", {"when": datetime.date(2025, 1, 1)})], generation_prompt=True)
