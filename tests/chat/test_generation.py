"""The spans of a template's generation blocks are those that transformers tracks."""

from __future__ import annotations

import pytest
from chat_samples import CHATML

from instil.chat.generation import CLOSE, OPEN, generation_spans
from instil.chat.template import Template
from instil.errors import TemplateError
from instil.types import Message

CHAT = [
    Message("system", "Be kind."),
    Message("user", "Hi there"),
    Message("assistant", "  Hello world, the answer is yes.\n"),
    Message("user", "Größe 👋🏽?"),
    Message("assistant", "[[1,2],[3,4]] 👋🏽 is a list"),
]
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
WHOLE = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}"
TEMPLATES = {
    "with its end": HEAD + WHOLE + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    "content alone": HEAD + "{% generation %}{{ m.content | trim }}{% endgeneration %}<|im_end|>\n{% endfor %}",
    "spaces controlled": HEAD + "\n  {%- generation -%}  {{ m.content }}\n  {%- endgeneration -%}\n <|im_end|>{% endfor %}",
    "two in a turn": HEAD + "{% generation %}a{% endgeneration %}b{% generation %}c{% endgeneration %}{% endfor %}",
    "empty": HEAD + "{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
    "unused": HEAD + "{{ m.content }}{% if false %}{% generation %}x{% endgeneration %}{% endif %}{% endfor %}",
    "in a comment": HEAD + "{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{{ m.content }}{% endfor %}",
    "none": CHATML,
}  # fmt: skip
WITHOUT = {"in a comment", "none"}


def tracked(source, generation_prompt=False):
    """The rendering and the spans as transformers' own function returns them."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    texts, spans = utils.render_jinja_template(
        [[message.as_dict() for message in CHAT]], chat_template=source, return_assistant_tokens_mask=True,
        add_generation_prompt=generation_prompt, bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    return texts[0], spans[0]


def template(source):
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, place="t")


@pytest.mark.parametrize("kind", TEMPLATES)
def test_spans_are_those_of_transformers(kind):
    """The characters are the ones that transformers notes down while it renders."""
    text, expected = tracked(TEMPLATES[kind])
    ours = template(TEMPLATES[kind])
    assert ours.render(CHAT, generation_prompt=False) == text
    assert generation_spans(ours, CHAT, [], {}) == (None if kind in WITHOUT else expected)


def test_spans_of_real_templates_are_those_of_transformers(shared_templates):
    """Real templates with generation blocks give transformers' spans, and the others none."""
    found = 0
    for path in sorted(shared_templates.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        spans = generation_spans(template(source), CHAT)
        if "endgeneration" in source:
            assert spans == tracked(source)[1], path.name
            assert [stop > start for start, stop in spans] == [True, True]
            found += 1
        else:
            assert spans is None, path.name
    assert found >= 1


def test_tokens_in_the_spans_are_the_answers_of_transformers(chatml, oracle):
    """The tokens that lie in the spans are those that apply_chat_template marks as the assistant's.

    Only where blocks begin with a letter: with a byte-level tokenizer it marks nothing where one begins with a space,
    and it misses all but the first token of a character.
    """
    source, tokenizer = TEMPLATES["with its end"], oracle(chatml)
    chat = [CHAT[1], Message("assistant", "The answer is yes."), CHAT[1], Message("assistant", "[[1,2],[3,4]]")]
    marked = tokenizer.apply_chat_template(
        [message.as_dict() for message in chat],
        chat_template=source,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    ours = template(source)
    text, spans = ours.render(chat, generation_prompt=False), generation_spans(ours, chat)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [int(any(start < b and a < stop for start, stop in spans)) for a, b in offsets]
    assert inside == marked["assistant_masks"]
    assert 0 < sum(inside) < len(inside)


def test_arguments_and_tools_reach_the_template():
    """The spans are those of the rendering with the row's own arguments and tools."""
    source = "{{ style }}{{ tools[0].name }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert generation_spans(template(source), CHAT[1:2], [{"name": "add"}], {"style": "long"}) == [(7, 15)]


def test_captured_text_is_followed_to_where_it_appears():
    """A block inside a captured text or a macro is found where the text lands, by hand: after the three dots."""
    block = "{% generation %}yes{% endgeneration %}"
    for source in (
        f"{{% set x %}}{block}{{% endset %}}...{{{{ x }}}}!",
        f"{{% macro f() %}}{block}{{% endmacro %}}...{{{{ f() }}}}!",
    ):
        assert generation_spans(template(source), CHAT) == [(3, 6)]


@pytest.mark.parametrize("after", ["x | trim", "x[2:]", "x[:3]", "x | length", "x | reverse"])
def test_text_that_is_treated_further_has_no_spans(after):
    """Where a template works on the text of its blocks, the answer is none rather than wrong."""
    source = "{% set x %}{% generation %} yes {% endgeneration %}{% endset %}{{ " + after + " }}"
    assert generation_spans(template(source), CHAT) is None


def test_no_row_can_forge_a_span():
    """Private-use characters in a row move nothing."""
    fake = OPEN.replace(OPEN[1:-1], "12345") + "x" + CLOSE.replace(CLOSE[1:-1], "12345")
    source = "{{ messages[0].content }}{% generation %}yes{% endgeneration %}"
    assert generation_spans(template(source), [Message("user", fake)]) == [(len(fake), len(fake) + 3)]


def test_a_refusal_is_passed_on():
    """A template that refuses the messages is reported as in any rendering."""
    source = "{% generation %}{{ raise_exception('No.') }}{% endgeneration %}"
    with pytest.raises(TemplateError, match=r"refuses these messages: No\."):
        generation_spans(template(source), CHAT)
