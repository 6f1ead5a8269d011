"""Whatever a template is, there is one typed error with its place, or a rendering; never a hang or a traceback."""

from __future__ import annotations

import datetime
import json
import os
import time

import pytest
from chat_samples import CHATML, LLAMA3, MISTRAL
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.chat import template as template_module
from instil.chat.template import SIZE_LIMIT_BYTES, Template, load_template, named_templates
from instil.chat.vetting import time_limit
from instil.errors import TemplateError
from instil.types import Message

USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello.", {"reasoning": "Why?"})
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CONVERSATIONS = [
    ([USER], []),
    ([Message("system", "Be kind."), USER, ANSWER, USER], []),
    ([USER, Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "2"), ANSWER], TOOLS),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ── which template is used ───────────────────────────────────────────────────────────────────────────────────────────

LISTED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
BY_NAME = {item["name"]: item["template"] for item in LISTED}


def write(folder, config=None, beside=None, additional=None, processor=None):
    """Put templates into every place of a model folder that holds some."""
    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text()) | ({} if config is None else {"chat_template": config})
    path.write_text(json.dumps(named))
    if beside is not None:
        (folder / "chat_template.jinja").write_text(beside)
    for name, source in (additional or {}).items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(source)
    if processor is not None:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": processor}))
    return folder


PLACES = {
    "a text in the configuration": ({"config": "C"}, {"default": "C"}),
    "a list in the configuration": ({"config": LISTED}, BY_NAME),
    "a file": ({"beside": "F"}, {"default": "F"}),
    "a file over a text": ({"beside": "F", "config": "C"}, {"default": "F"}),
    "a file over a list": ({"beside": "F", "config": LISTED}, {"default": "F"}),
    "files": ({"beside": "F", "additional": {"tool_use": "T", "x.y": "X"}}, {"default": "F", "tool_use": "T", "x.y": "X"}),
    "additional files alone": ({"additional": {"tool_use": "T"}, "config": "C"}, {"tool_use": "T"}),
    "an additional default": ({"beside": "F", "additional": {"default": "A"}}, {"default": "A"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_named_templates_are_those_of_transformers(make_folder, oracle, kind):
    """Files replace the configuration, and each template has the name that transformers gives it."""
    places, expected = PLACES[kind]
    folder = write(make_folder(), **places)
    theirs = oracle(folder).chat_template
    assert named_templates(folder) == expected == ({"default": theirs} if isinstance(theirs, str) else theirs)
    if "default" in expected:
        assert load_template(folder).source == oracle(folder).get_chat_template() == expected["default"]
    for name, source in expected.items():
        assert load_template(folder, name=name).source == source


def test_a_mapping_of_names_is_read_too(make_folder):
    """`chat_template` as an object, which some models have, is the same as the list."""
    assert named_templates(write(make_folder(), config=BY_NAME)) == BY_NAME


def test_templates_that_transformers_saved_are_found(make_folder, oracle, tmp_path):
    """Several templates, written by transformers in its present layout, come back by name."""
    oracle(write(make_folder(), config=LISTED)).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert named_templates(tmp_path / "saved") == BY_NAME


def test_a_name_that_is_not_there_lists_those_that_are(make_folder):
    """A wrong name, or no default, is answered with the names and the option."""
    folder = write(make_folder(), additional={"tool_use": "T", "rag": "R"})
    for name, wanted in ((None, "default"), ("tools", "tools")):
        with pytest.raises(TemplateError, match=rf"named '{wanted}', only 'rag', 'tool_use'; .*--template NAME") as e:
            load_template(folder, name=name)
        assert e.value.exit_code == 4


def test_a_model_without_template_is_told_where_one_was_looked_for(make_folder):
    """A base model: the error names the places and the option."""
    with pytest.raises(TemplateError, match=r"no chat template: .*chat_template\.jinja.*tokenizer_config\.json.*FILE$"):
        load_template(make_folder())
    assert named_templates(make_folder()) == {}


def test_a_processors_template_is_the_last_resort_and_noticed(make_folder):
    """chat_template.json counts only where nothing else is there, and the user is told."""
    folder = write(make_folder(), processor="P")
    found = load_template(folder)
    assert found.source == "P"
    assert "processor" in found.notices[0]
    assert load_template(write(folder, config="C")).source == "C"


def test_another_template_in_the_configuration_is_noticed(make_folder):
    """Two different templates in one model: the file is used, as in transformers, and the user is told."""
    folder = write(make_folder(), beside="F\n", config="C")
    assert "holds another template, which is not used" in load_template(folder).notices[0]
    assert load_template(write(folder, config="F\r\n")).notices == ()


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (5, "not text but of type int"), ({"default": None}, "not text but of type NoneType"),
        ([{"name": [1], "template": 2}], "not text but of type int"), ("", "is empty"), (" \n", "is empty"),
        ([], "no chat template"), ({}, "no chat template"), ([1], "no chat template"), (None, "no chat template"),
        ("a\ud800", "holds NUL or half a character"), ("a\0", "holds NUL or half a character"),
        ("x" * (SIZE_LIMIT_BYTES + 1), "1,000,001 bytes"), ([{"name": "default"}], "not text but of type NoneType"),
    ],
)  # fmt: skip
def test_an_entry_that_is_no_template_is_refused(make_folder, entry, reason):
    """Whatever JSON stands under chat_template, the error says what is wrong with it."""
    folder = make_folder()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(TemplateError, match=reason):
        load_template(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"[" * 100_000, b"{}", b'{"chat_template": 5}'])
def test_a_broken_processor_file_is_refused(make_folder, content):
    """chat_template.json that is not JSON, or holds no template, is a typed error."""
    folder = make_folder()
    (folder / "chat_template.json").write_bytes(content)
    with pytest.raises(TemplateError):
        load_template(folder)


# ── files that are no template ───────────────────────────────────────────────────────────────────────────────────────


def refusal(folder, path):
    with pytest.raises(TemplateError) as e:
        load_template(folder, path)
    assert str(path) in str(e.value)
    assert str(e.value).count("\n") == 0
    return str(e.value)


def test_only_regular_files_are_read(make_folder, tmp_path):
    """A folder, a pipe, a device or a missing file is refused at once; nothing waits for its end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = make_folder()
    start = time.monotonic()
    for path in (tmp_path, tmp_path / "pipe", template_module.Path("/dev/zero"), template_module.Path("/dev/null")):
        assert "not a regular file" in refusal(folder, path)
    for path in (tmp_path / "none", tmp_path / "loop", tmp_path / "pipe" / "x", tmp_path / ("x" * 300)):
        assert "cannot be read" in refusal(folder, path)
    with pytest.raises(TemplateError, match="cannot be read"):
        load_template(folder, template_module.Path("a\0b"))
    assert time.monotonic() - start < 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(make_folder, tmp_path):
    """The error says so."""
    (tmp_path / "t.jinja").write_text("x")
    (tmp_path / "t.jinja").chmod(0)
    assert "Permission denied" in refusal(make_folder(), tmp_path / "t.jinja")


def test_a_template_file_that_is_a_folder_or_broken_link_is_not_skipped(make_folder):
    """What stands at chat_template.jinja is meant: no other template is taken in its place silently."""
    folder = write(make_folder(), config="C")
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: .*not a regular file"):
        load_template(folder)
    (folder / "chat_template.jinja").rmdir()
    (folder / "chat_template.jinja").symlink_to(folder / "none")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: .*No such file"):
        load_template(folder)


@pytest.mark.parametrize(
    "content", [b"\xff\xfex\0", b"\x89PNG\r\n\x1a\n\0", b"a\0b", os.urandom(4096), b"", b"\xef\xbb\xbf"]
)
def test_a_binary_or_empty_file_is_refused(make_folder, tmp_path, content):
    """It is not shown, not compiled, and the error is one line."""
    (tmp_path / "t.jinja").write_bytes(content)
    refusal(make_folder(), tmp_path / "t.jinja")


def test_a_file_of_ten_megabytes_is_refused_before_it_is_read(make_folder, tmp_path):
    """The size alone decides."""
    with (tmp_path / "t.jinja").open("wb") as file:
        file.truncate(10_000_000)
    assert "10,000,000 bytes, more than 1,000,000" in refusal(make_folder(), tmp_path / "t.jinja")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_are_made_lf_with_a_notice(make_folder, oracle, end):
    """The text is what transformers renders from the same file, and the digest that of the LF file."""
    folder, plain = make_folder(), make_folder(CHATML)
    (folder / "chat_template.jinja").write_bytes(CHATML.replace("\n", end).encode())
    found, messages = load_template(folder), CONVERSATIONS[1][0]
    chat = [message.as_dict() for message in messages]
    assert found.render(messages, generation_prompt=True) == oracle(folder).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    assert found.digest == load_template(plain).digest
    assert ["LF" in notice for notice in found.notices] == [True]
    assert load_template(plain).notices == ()


def test_a_byte_order_mark_is_removed_with_a_notice(make_folder, tmp_path):
    """An editor's mark does not become the first character of every prompt."""
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}")
    found = load_template(make_folder(), tmp_path / "t.jinja")
    assert found.render([USER], generation_prompt=True) == "Hi"
    assert ["byte order mark" in notice for notice in found.notices] == [True]


# ── templates that are wrong or hostile ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{% for m in messages %}", "Unexpected end of template"), ("{{ m.content | nofilter }}", "nofilter"),
        ("{% endfor %}", "unknown tag 'endfor'"), ("{% trans %}", "unknown tag 'trans'"), ("{{ 1 + }}", "unexpected"),
        ("{{ 'open }}", "unexpected char"), ("{% generation %}", "endgeneration"),
    ],
)  # fmt: skip
def test_a_syntax_error_names_file_and_line(make_folder, line, words):
    """The third line is wrong, and the error says so."""
    with pytest.raises(TemplateError, match=rf"chat_template\.jinja:3: .*syntax error: .*{words}"):
        load_template(make_folder("{# one #}\n\n" + line))


UNCOMPILED = {
    "break outside a loop": "{% break %}",
    "continue in a macro": "{% for m in messages %}{% macro f() %}{% continue %}{% endmacro %}{% endfor %}",
    "break in a generation block": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "one argument twice": "{% macro f(a, a) %}{% endmacro %}",
    "one keyword twice": "{{ f(a=1, a=2) }}",
    "loops too deep": "{% for m in messages %}" * 25 + "{% endfor %}" * 25,
    "brackets too deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "conditions too deep": "{% if x %}" * 3000 + "{% endif %}" * 3000,
    "number too long": "{{ 1" + "0" * 5000 + " }}",
}


@pytest.mark.parametrize("kind", UNCOMPILED)
def test_what_jinja_accepts_and_python_does_not_is_refused(kind):
    """jinja2 turns a template into Python; where Python refuses that, the template is wrong, not instil."""
    with pytest.raises(TemplateError, match=r"^t\b.*template.*--template FILE"):
        Template(UNCOMPILED[kind], SPECIAL, place="t")


ATTACKS = [
    "{{ ''.__class__.__mro__ }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ (''|attr('__class__')).mro }}",
    "{{ ''['__class__'].mro }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))('') }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ lipsum.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ strftime_now.__self__.source }}",
    "{{ dict.fromkeys.__func__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "{{ messages|sort(attribute='__class__.x') }}",
    "{{ ['']|groupby('__class__.x')|list }}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.append(1) }}",
    "{{ (messages|attr('append'))(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ tools.clear() }}",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_way_out_of_the_sandbox_is_closed(make_folder, attack):
    """Each known way ends within two seconds in a SecurityError with file and line, and with the messages unchanged."""
    start = time.monotonic()
    found = load_template(make_folder(attack))
    messages = [USER, ANSWER]
    with pytest.raises(TemplateError, match=r"chat_template\.jinja:1: .*SecurityError"):
        found.render(messages, tools=TOOLS, generation_prompt=True)
    assert time.monotonic() - start < 2
    assert messages == [USER, ANSWER]


@pytest.mark.parametrize("harmless", ["{{ ''.__class__ }}", "{{ [messages]|map('attr', '__class__')|first }}"])
def test_a_look_at_what_is_closed_shows_nothing(harmless):
    """What is not used further is empty text."""
    assert Template(harmless, SPECIAL, place="t").render([USER], generation_prompt=True) == ""


def test_load_refuses_what_breaks_the_limits_before_compiling_it(make_folder, monkeypatch):
    """The trial comes first: jinja2 computes constants while it compiles, so even that is left to the child."""
    compiled = []
    monkeypatch.setattr(template_module, "Template", lambda *_, **__: compiled.append(1))
    with pytest.raises(TemplateError, match=r"chat_template\.jinja: the template used more than 512 MB"):
        load_template(make_folder("{{ 'a' * 10**9 }}"))
    assert compiled == []


def test_the_given_date_is_told_on_any_day(monkeypatch):
    """Two renderings on different days are equal when the date is given, and differ when it is not."""

    def rendered(day, today):
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return day

        monkeypatch.setattr(template_module.datetime, "date", Date)
        made = Template("{{ strftime_now('%Y-%m-%d') }}", {}, place="t", today=today)
        text = made.render([USER], generation_prompt=True)
        assert made.uses_date
        assert text == made.today.isoformat()
        return text

    monday, friday = datetime.date(2025, 6, 2), datetime.date(2025, 6, 6)
    assert rendered(monday, monday) == rendered(friday, monday) == "2025-06-02"
    assert rendered(monday, None) != rendered(friday, None)


# ── random programs ──────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = [
    "messages",
    "m",
    "loop",
    "x",
    "n",
    "tools",
    "bos_token",
    "add_generation_prompt",
    "caller",
    "f",
    "self",
    "none",
]
ATTRIBUTES = [
    "role",
    "content",
    "first",
    "index0",
    "tool_calls",
    "items()",
    "x",
    "split('e')",
    "__class__",
    "strip()",
    "0",
]
FILTERS = ["trim", "tojson", "length", "upper", "join(',')", "first", "list", "int", "default('d')", "map(attribute='role')",
           "selectattr('role', 'equalto', 'user')", "replace('e', '')", "center(9)", "batch(2)", "sort", "indent", "items",
           "nofilter", "format(1)", "string", "safe", "tojson(indent=2)", "reject('none')", "sum", "reverse"]  # fmt: skip
TESTS = ["defined", "none", "string", "mapping", "iterable", "odd", "true", "sameas(1)", "notest", "in([1])", "lower"]
OPERATORS = ["+", "-", "~", "*", "/", "%", "//", "==", "<", "in", "and", "or", "not in"]
LITERALS = [
    "''",
    "'a'",
    "0",
    "3",
    "17",
    "1.5",
    "true",
    "[]",
    "{}",
    "{'a': 1}",
    "[1, 'b']",
    "(1,)",
    "range(9)",
    "'%s'",
    "-1",
]
atoms = st.sampled_from(NAMES + LITERALS)


def grow(inner):
    """One step from smaller expressions to larger ones."""
    return st.one_of(
        st.builds("{}.{}".format, inner, st.sampled_from(ATTRIBUTES)),
        st.builds("{}|{}".format, inner, st.sampled_from(FILTERS)),
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({} is {})".format, inner, st.sampled_from(TESTS)),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:{}]".format, inner, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("{}({})".format, st.sampled_from([*NAMES, "namespace", "dict", "strftime_now", "cycler"]), inner),
        st.builds("raise_exception({})".format, inner),
    )


expressions = st.recursive(atoms, grow, max_leaves=5)
targets = st.sampled_from(["x", "n.x", "x, n", "loop", "messages", "n.__class__", "none"])
simple = st.one_of(
    st.sampled_from(
        ["text", "\n", " ", "{# c #}", "{% break %}", "{% continue %}", "{{", "%}", "{% raw %}", "<|im_end|>\n"]
    ),
    st.builds("{{{{ {} }}}}".format, expressions),
    st.builds("{{{{- {} -}}}}".format, expressions),
    st.builds("{{% set {} = {} %}}".format, targets, expressions),
    st.builds("{{% set n = namespace(x={}) %}}".format, expressions),
    st.builds("{{% {} {} %}}".format, st.sampled_from(["include", "import", "extends", "do", "else", "endfor"]), atoms),
)


def nest(inner):
    """Statements with statements inside."""
    body = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, expressions, body),
        st.builds("{{% for x, m in {} %}}{}{{% else %}}{}{{% endfor %}}".format, expressions, body, body),
        st.builds("{{%- for m in messages recursive %}}{}{{{{ loop({}) }}}}{{% endfor -%}}".format, body, expressions),
        st.builds("{{% if {} %}}{}{{% elif x %}}{}{{% else %}}y{{% endif %}}".format, expressions, body, body),
        st.builds("{{% macro f(x, n={}) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, expressions, body, expressions),
        st.builds("{{% call f({}) %}}{}{{% endcall %}}".format, expressions, body),
        st.builds("{{% set x %}}{}{{% endset %}}".format, body),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(FILTERS), body),
        st.builds("{{% block {} %}}{}{{% endblock %}}".format, st.sampled_from("ab"), body),
        st.builds("{{% generation %}}{}{{%- endgeneration %}}".format, body),
        st.builds("{{% with x = {} %}}{}{{% endwith %}}".format, expressions, body),
    )


programs = st.lists(st.recursive(simple, nest, max_leaves=6), max_size=5).map("".join)
FRAGMENTS = [
    "{%",
    "%}",
    "{{",
    "}}",
    "-",
    "'",
    "|",
    "{% endif %}",
    "{% if x %}",
    "{% for m in messages %}",
    "(",
    ")",
    "\n",
    "#}",
]


@st.composite
def mutated(draw):
    """A template as models have them, with parts deleted, doubled, moved or replaced."""
    source = draw(st.sampled_from([CHATML, LLAMA3, MISTRAL]))
    for _ in range(draw(st.integers(1, 4))):
        a, b = sorted(draw(st.tuples(st.integers(0, len(source)), st.integers(0, len(source)))))
        b = min(b, a + 40)
        middle = draw(st.sampled_from(["", source[a:b] * 2, source[a:b][::-1], *FRAGMENTS]))
        source = source[:a] + middle + source[b:]
    return source


def try_out(source):
    """Compile and render: `refused` where a TemplateError comes; anything else that comes is a fault of ours."""
    try:
        with time_limit(2, "t"):
            made = Template(source, SPECIAL, place="t")
            for messages, tools in CONVERSATIONS:
                made.render(messages, tools=tools, generation_prompt=True)
    except TemplateError as error:
        return "refused" if str(error).startswith("t") and "--template FILE" in str(error) else "badly said"
    return "rendered"


@given(programs)
@settings(max_examples=300, deadline=None)
def test_random_programs_render_or_are_refused(source):
    """Loops, macros, filters, namespaces, sets and broken syntax: nothing but TemplateError comes out."""
    assert try_out(source) in ("rendered", "refused")


@given(mutated())
@settings(max_examples=300, deadline=None)
def test_damaged_templates_render_or_are_refused(source):
    """A real template with damage: nothing but TemplateError comes out."""
    assert try_out(source) in ("rendered", "refused")


@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=200) | st.text(alphabet="{}%#-'\"()[]|.x \n", max_size=60)
)
@settings(max_examples=200, deadline=None)
def test_random_text_renders_or_is_refused(source):
    """Text of any kind as a template: nothing but TemplateError comes out."""
    assert try_out(source) in ("rendered", "refused")


def test_the_random_programs_do_both():
    """The grammar is no straw man: by hand, programs of its kind that render and that do not."""
    assert try_out("{% set n = namespace(x=17) %}{% for m in messages %}{{ m.role|upper }}{% endfor %}") == "rendered"
    assert try_out("{% for m in messages %}{{ (m.x + 1)|tojson }}{% endfor %}") == "refused"
