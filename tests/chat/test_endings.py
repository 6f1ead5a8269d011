"""What ends an answer is found in the template, decided by generation_config, or said by the user; never guessed."""

from __future__ import annotations

import pytest
from chat_samples import CHATML, LLAMA3, MISTRAL, SPACED

from instil.chat.endings import Endings
from instil.chat.pairs import make_examples
from instil.chat.template import Template
from instil.chat.tokenizer import load_tokenizer
from instil.chat.turns import ChatOptions
from instil.errors import TemplateError
from instil.types import Conversation, Message

U, A = (lambda text, role=role, **fields: Message(role, text, fields) for role in ("user", "assistant"))
ROW = Conversation((U("one"), A("a"), U("two"), A("b")), "a:1")
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"who": "Ada"}}}
WITH_CALL = Conversation((U("Who?"), A("", tool_calls=[CALL]), Message("tool", "Ada"), A("Ada.")), "a:1")

# The end stands before the next message only, as in Apertus: the last answer of a rendering has none.
LATER = """{% for m in messages %}{% if m.role == 'user' and not loop.first %}<|im_end|>{% endif -%}
<|im_start|>{{ m.role }}
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# No end at all: the server stops at the header of the next message, as in GLM.
HEADERS = """{% set headers = {'tool': '<|eot_id|>', 'user': '<|im_end|>', 'assistant': '<|im_start|>'} %}
{% for m in messages %}{{ headers[m.role] }}
{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>
{% endif %}"""
NOTHING = "{% for m in messages %}{{ m.content }}{% endfor %}"
LINES = """{% for m in messages %}{{ m.role }}: {{ m.content }}

{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(chatml):
    return load_tokenizer(chatml)


def template_of(source):
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, place="mine.jinja")


def answers(source, tokenizer, row=ROW, **options):
    pairs = make_examples([row], tokenizer, template_of(source), ChatOptions(**options))
    assert pairs.problems == []
    return [tokenizer.decode(example.answer_tokens) for example in pairs.examples]


@pytest.mark.parametrize(
    ("source", "text"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (MISTRAL, "</s>"), (SPACED, "<|im_end|>")]
)
def test_end_in_the_turn_is_found(tokenizer, source, text):
    """The first control token after the content is the terminator; it is one id, and the rendering has it."""
    ending = Endings(template_of(source), tokenizer).plain
    assert (ending.text, ending.token_ids, ending.appended) == (text, (tokenizer.control_tokens[text],), False)
    assert ending.token_id == tokenizer.control_tokens[text]
    assert ending.as_dict()["source"] == "the template writes it at the end of the turn"


def test_generation_config_cannot_overrule_the_template(tokenizer):
    """Where the template writes an end in the turn, that is what is learnt, whatever else a server stops at."""
    assert Endings(template_of(CHATML), tokenizer, stops=("</s>",)).plain.text == "<|im_end|>"


def test_end_before_the_next_message_is_appended(tokenizer):
    """An end that only a following message brings is put after each answer, once."""
    ending = Endings(template_of(LATER), tokenizer).plain
    assert (ending.text, ending.appended) == ("<|im_end|>", True)
    assert ending.source == "the template writes it once another message follows"
    assert answers(LATER, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]


def test_header_of_the_next_message_ends_an_answer(tokenizer):
    """Without any end of its own a turn ends where the next begins: one token after text, another after calls."""
    endings = Endings(template_of(HEADERS), tokenizer)
    assert (endings.plain.text, endings.plain.appended) == ("<|im_end|>", True)
    assert endings.plain.source.startswith("the header of the next message")
    call = endings.of(WITH_CALL.messages[1])
    assert (call.text, call.appended) == ("<|eot_id|>", True)
    assert [ending.text for ending in endings.found] == ["<|im_end|>", "<|eot_id|>"]
    assert answers(HEADERS, tokenizer, WITH_CALL) == [
        '<call>{"name": "look_up", "arguments": {"who": "Ada"}}</call><|eot_id|>', "Ada.<|im_end|>"
    ]  # fmt: skip


@pytest.mark.parametrize(("stops", "text"), [(("</s>",), "</s>"), (("<|im_end|>", "</s>"), "<|im_end|>")])
def test_generation_config_decides_where_the_turn_has_no_end(tokenizer, stops, text):
    """An end found outside the turn stands if generation_config knows it, and else the one stop that it knows does."""
    ending = Endings(template_of(HEADERS), tokenizer, stops=stops).plain
    assert (ending.text, ending.appended) == (text, True)
    assert "generation_config" in ending.source
    assert answers(HEADERS, tokenizer, stops=stops) == [f"a{text}", f"b{text}"]


def test_eos_is_chosen_among_several_stops(tokenizer):
    """Of several stops the tokenizer's EOS is the end; without it the user must say."""
    stops = ("<|eot_id|>", "</s>")
    assert Endings(template_of(NOTHING), tokenizer, stops=stops).plain.text == "</s>"
    with pytest.raises(
        TemplateError, match=r"several: <\|eot_id\|>, <\|end_header_id\|>; say with chat\.terminator=TEXT"
    ):
        Endings(template_of(NOTHING), tokenizer, stops=("<|eot_id|>", "<|end_header_id|>"))


def test_no_end_names_the_remedy(tokenizer):
    """A template that writes nothing after an answer, and no generation_config: refused with what to set."""
    with pytest.raises(
        TemplateError, match=r"mine\.jinja: .*say with chat\.terminator=TEXT what the server stops at"
    ) as no:
        Endings(template_of(NOTHING), tokenizer)
    assert no.value.problems[0].rule == "no-terminator"


@pytest.mark.parametrize("source", [NOTHING, HEADERS, LATER])
def test_user_decides_where_the_template_does_not(tokenizer, source):
    """chat.terminator is what the answers end with, also against generation_config."""
    ending = Endings(template_of(source), tokenizer, asked="</s>", stops=("<|eot_id|>",)).plain
    assert (ending.text, ending.source, ending.appended) == ("</s>", "chat.terminator", True)


def test_user_decides_between_two_ends_of_the_template(tokenizer):
    """The user's terminator may be the second of two: what stands before it is learnt too."""
    source = CHATML.replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>{{ '</s>' if message.role == 'assistant' }}\n{% endfor %}"
    )
    assert answers(source, tokenizer) == ["a<|im_end|>", "b<|im_end|>"]
    ending = Endings(template_of(source), tokenizer, asked="</s>").plain
    assert (ending.text, ending.lead, ending.appended) == ("</s>", "<|im_end|>", False)
    assert answers(source, tokenizer, terminator="</s>") == ["a<|im_end|></s>", "b<|im_end|></s>"]


def test_text_can_end_an_answer(tokenizer):
    """A template of plain text ends answers with text, as RWKV's does: several tokens, all of them learnt."""
    ending = Endings(template_of(LINES), tokenizer).plain
    assert (ending.text, ending.token_ids) == ("\n\n", tuple(tokenizer.encode("\n\n")))
    assert ending.token_id is None
    pairs = make_examples([ROW], tokenizer, template_of(LINES))
    assert [tokenizer.decode(example.answer_tokens) for example in pairs.examples] == [" a\n\n", " b\n\n"]
    assert all((example.kinds[-2:] == 3).all() and example.kinds[0] == 0 for example in pairs.examples)


def test_content_that_holds_a_text_end_is_refused(tokenizer):
    """Where a blank line ends an answer, a content with one would be cut short: the row is refused."""
    rows = [ROW, Conversation((U("x"), A("one\n\ntwo")), "a:2")]
    pairs = make_examples(rows, tokenizer, template_of(LINES))
    assert len(pairs.examples) == 2
    assert [problem.place for problem in pairs.problems] == ["a:2: messages[1]"]
    assert pairs.problems[0].rule in ("ambiguous-terminator", "content-lost")


def test_end_that_looks_like_a_control_token_is_text_where_it_is_none(tokenizer):
    """`<|other|>` is no token of this tokenizer: it is learnt as the text that the server looks for."""
    source = CHATML.replace("<|im_end|>", "<|other|>")
    ending = Endings(template_of(source), tokenizer).plain
    assert (ending.text, ending.token_ids) == ("<|other|>", tuple(tokenizer.encode("<|other|>")))
    assert len(ending.token_ids) > 1
    assert answers(source, tokenizer) == ["a<|other|>", "b<|other|>"]


def test_null_content_is_found_out_by_trying(tokenizer):
    """A template that writes calls only beside a null content gets null, and the calls are learnt."""
    source = CHATML.replace(
        "{{ message.content }}",
        "{% if message.content is none %}{{ message.tool_calls | tojson }}{% else %}{{ message.content }}{% endif %}",
    )
    template = template_of(source)
    assert "look_up" in tokenizer.decode(make_examples([WITH_CALL], tokenizer, template).examples[0].answer_tokens)
    assert template.null_content
    shown = "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}"
    plain = template_of(CHATML.replace("{{ message.content }}", shown))
    make_examples([WITH_CALL], tokenizer, plain)
    assert not plain.null_content


@pytest.mark.parametrize("times", [0, 2])
def test_content_must_be_written_once(tokenizer, times):
    """A template that writes the assistant's content never, or twice, says where the turn ends to nobody."""
    shown = "{{ message.content * (1 if message.role == 'user' else TIMES) }}".replace("TIMES", str(times))
    source = CHATML.replace("{{ message.content }}", shown)
    with pytest.raises(TemplateError, match=f"content {times} times"):
        Endings(template_of(source), tokenizer)
