"""Where a prompt opens a channel the answer begins with what closes it, and that text is the template's own."""

from __future__ import annotations

import pytest

from instil.chat.certificate import certify
from instil.chat.channel import find_channel
from instil.chat.pairs import make_examples
from instil.chat.template import Template
from instil.chat.tokenizer import load_tokenizer
from instil.errors import TemplateError
from instil.types import Conversation, Message

U, A = (lambda text, role=role, **fields: Message(role, text, fields) for role in ("user", "assistant"))
ASK = (U("x"),)
ROW = Conversation((U("x"), A("yes"), U("y"), A("no")), "a:1")
START, END = "<|im_start|>", "<|im_end|>"

BODY = START + "{{ m.role }}\n%s{{ m.content }}" + END + "\n"
ASKED = "{%% if add_generation_prompt %%}" + START + "assistant\n%s{%% endif %%}"
LOOP = "{%% for m in messages %%}" + BODY + "{%% endfor %%}" + ASKED
OPEN = "<think>\n"
REASONED = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
# 1: the template writes reasoning after that prompt. 2: it has a switch. 3: it looks for the end of the reasoning.
WRITES = LOOP % (REASONED, OPEN)
SWITCHED = LOOP % (
    "",
    OPEN + "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}",
)
SWITCHED_OFF = LOOP % ("", OPEN + "{% if not thinking %}{{ '\n</think>\n\n' }}{% endif %}")
LOOKS = (LOOP % ("", OPEN)).replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
NOTHING = LOOP % ("", OPEN)
PRECEDENCE = LOOP % (REASONED, OPEN + "{% if enable_thinking is defined and not enable_thinking %}</off>{% endif %}")


def template_of(source, **args):
    return Template(source, {}, place="mine.jinja", args=args)


def channel_of(template, before=ASK, cache=None):
    prompt = template.render(before, generation_prompt=True)
    return find_channel(template, before, (), {}, prompt, {} if cache is None else cache)


@pytest.fixture(scope="module")
def tokenizer(chatml):
    return load_tokenizer(chatml)


@pytest.mark.parametrize(
    ("source", "closing", "opening"),
    [
        (WRITES, "\n</think>\n\n", "<think>\n"),
        (SWITCHED, "\n</think>\n\n", "<think>\n"),
        (SWITCHED_OFF, "", "<think>\n\n</think>\n\n"),
        (LOOKS, "</think>", "<think>\n"),
        (PRECEDENCE, "\n</think>\n\n", "<think>\n"),
    ],
    ids=["reasoning", "switch", "switched off", "split", "reasoning before switch"],
)
def test_closing_is_read_from_the_template(source, closing, opening):
    """The closing text comes from how the template writes reasoning, from its switch, or from where it cuts."""
    found = channel_of(template_of(source))
    assert found is not None
    assert (found.opening, found.closing, found.is_open) == (opening, closing, bool(closing))
    assert found.lead == ""
    assert found.shared == len(f"{START}user\nx{END}\n{START}assistant\n")


def test_switch_that_is_set_is_respected():
    """With the switch off by the template's own arguments, the channel is closed in the prompt."""
    found = channel_of(template_of(SWITCHED, enable_thinking=False))
    assert (found.opening, found.closing) == ("<think>\n\n</think>\n\n", "")
    found = channel_of(template_of(SWITCHED_OFF, thinking=True))
    assert (found.opening, found.closing) == ("<think>\n", "\n</think>\n\n")


def test_switch_that_changes_older_turns_too_is_followed():
    """Whether older turns are written with the channel does not matter: only the generation prompts are compared."""
    older = "{{ '<think>' if thinking and m.role == 'assistant' }}"
    source = LOOP % (older, "{{ '<think>' if thinking else '<think></think>' }}")
    before = (U("x"), A("yes"), U("y"))
    for messages in (ASK, before):
        found = channel_of(template_of(source), messages)
        assert (found.opening, found.closing) == ("<think></think>", "")


def test_template_that_shows_no_closing_has_no_channel(tokenizer):
    """Where nothing in the template closes what the prompt opens, the row is refused: nothing is invented."""
    assert channel_of(template_of(NOTHING)) is None
    with pytest.raises(TemplateError, match="rewrites the prompt once the answer is there, and shows no way to go on"):
        make_examples([ROW], tokenizer, template_of(NOTHING))


def test_prompt_that_the_turn_goes_on_from_has_no_opening():
    """A template whose stored turn begins with the prompt needs nothing closed."""
    found = channel_of(template_of(LOOP % ("", "")))
    assert (found.opening, found.closing, found.lead) == ("", "", "")


@pytest.mark.parametrize(
    ("source", "answers", "note"),
    [
        (WRITES, ["\n</think>\n\nyes", "\n</think>\n\nno"], "channels_closed"),
        (SWITCHED, ["\n</think>\n\nyes", "\n</think>\n\nno"], "channels_closed"),
        (SWITCHED_OFF, ["yes", "no"], "channels_closed_by_prompt"),
        (LOOKS, ["</think>yes", "</think>no"], "channels_closed"),
    ],
)
def test_answers_go_on_from_the_prompt(tokenizer, source, answers, note):
    """Prompt + answer is a text that the model can have written: the channel is opened once and closed once."""
    template = template_of(source)
    pairs = make_examples([ROW], tokenizer, template)
    assert [tokenizer.decode(example.answer_tokens) for example in pairs.examples] == [text + END for text in answers]
    assert pairs.notes == {note: 2}
    for example, before in zip(pairs.examples, (ROW.messages[:1], ROW.messages[:3]), strict=True):
        assert tokenizer.decode(example.prompt_tokens) == template.render(before, generation_prompt=True)
    assert certify(pairs.examples, [ROW], tokenizer, template, {})[1] == []


def test_reasoning_fills_the_open_channel(tokenizer):
    """Where the row has reasoning and the template writes it, the answer is reasoning, closing, content."""
    row = Conversation((U("x"), A("yes", reasoning_content="because"), U("y"), A("no")), "a:1")
    pairs = make_examples([row], tokenizer, template_of(WRITES))
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    assert texts == ["because\n</think>\n\nyes" + END, "\n</think>\n\nno" + END]
    assert pairs.notes == {"channels_closed": 1}


def test_inline_reasoning_is_not_opened_twice(tokenizer):
    """A content that opens the channel itself goes on inside the one that the prompt opened."""
    row = Conversation((U("x"), A("<think>\nwhy</think>yes")), "a:1")
    template = template_of(LOOKS)
    pairs = make_examples([row], tokenizer, template)
    assert tokenizer.decode(pairs.examples[0].answer_tokens) == "why</think>yes" + END
    assert certify(pairs.examples, [row], tokenizer, template, {})[1] == []


def test_channel_is_not_opened_twice(tokenizer):
    """Where the template closes the opened channel and writes the content's own after it, the row is refused."""
    source = LOOP % ("{{ '<think>' ~ (m.reasoning_content or '') ~ '</think>' if m.role == 'assistant' }}", "<think>")
    rows = [ROW, Conversation((U("x"), A("<think>why</think>yes")), "a:2")]
    pairs = make_examples(rows, tokenizer, template_of(source))
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    assert texts == ["</think>yes" + END, "</think>no" + END]
    assert [(problem.place, problem.rule) for problem in pairs.problems] == [("a:2: messages[1]", "channel-closed")]
    assert "reasoning_content" in pairs.problems[0].remedy
    told = Conversation((U("x"), A("yes", reasoning_content="why")), "a:2")
    (example,) = make_examples([told], tokenizer, template_of(source)).examples
    assert tokenizer.decode(example.answer_tokens) == "why</think>yes" + END


def test_reasoning_after_a_closed_channel_is_refused(tokenizer):
    """A prompt that closes the channel and an answer that fills it do not belong together: the remedy is named."""
    rows = [ROW, Conversation((U("x"), A("<think>\nwhy\n</think>\n\nyes")), "a:2")]
    pairs = make_examples(rows, tokenizer, template_of(SWITCHED_OFF))
    assert len(pairs.examples) == 2
    (problem,) = pairs.problems
    assert problem.rule == "channel-closed"
    assert "enable_thinking: true" in problem.remedy


def test_row_decides_whether_it_thinks(tokenizer):
    """The row's own template arguments decide prompt and answer of that row."""
    off = Conversation(ROW.messages, "a:2", template_args={"enable_thinking": False})
    pairs = make_examples([ROW, off], tokenizer, template_of(SWITCHED))
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    assert texts == ["\n</think>\n\nyes" + END, "\n</think>\n\nno" + END, "yes" + END, "no" + END]
    assert pairs.notes == {"channels_closed": 2, "channels_closed_by_prompt": 2}


def test_what_closes_a_channel_is_looked_up_once():
    """The same opening is answered from the cache; another one is not."""
    cache: dict[tuple[str, str], str | None] = {}
    template = template_of(SWITCHED)
    channel_of(template, cache=cache)
    assert cache == {("<think>\n", ""): "\n</think>\n\n"}
    cache["<think>\n", ""] = "</from cache>"
    assert channel_of(template, cache=cache).closing == "</from cache>"
