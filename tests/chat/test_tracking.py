"""A template that reads anything of a later message is noticed, and one that only looks back is rendered once."""

from __future__ import annotations

import pytest
from chat_samples import TEMPLATES

from instil.chat.template import Template
from instil.chat.tracking import TrackedTemplate
from instil.types import Message

MESSAGES = [Message(role, f"{role} {i}") for i in range(3) for role in ("user", "assistant")]
HEAD = "{% for m in messages %}"
TAIL = "[{{ m.role }}|{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[assistant|{% endif %}"
BACK = {
    "plain": HEAD + TAIL,
    "loop.first": HEAD + "{{ 'first' if loop.first }}" + TAIL,
    "loop.index": HEAD + "{{ loop.index0 }}{{ loop.index }}" + TAIL,
    "previous message by index": HEAD + "{{ messages[loop.index0 - 1].role if loop.index0 > 0 }}" + TAIL,
    "previtem": HEAD + "{{ loop.previtem.role if loop.previtem }}" + TAIL,
    "first message before the loop": "{{ messages[0].role }}" + HEAD + TAIL,
    "first message in the loop": HEAD + "{{ messages[0].role }}" + TAIL,
    "the rest after a system message": "{% set rest = messages[1:] %}{{ messages[0].content }}{% for m in rest %}"
    + TAIL,
    "namespace in the loop": "{% set n = namespace(i=0) %}" + HEAD + "{% set n.i = n.i + 1 %}{{ n.i }}" + TAIL,
    "a length of something else": HEAD + "{{ m.content | length }}" + TAIL,
    "an inner loop": HEAD + "{% for c in m.content %}{{ c if loop.last }}{% endfor %}" + TAIL,
    "macro": "{% macro shown(m) %}<{{ m.role }}>{% endmacro %}" + HEAD + "{{ shown(m) }}" + TAIL,
    "a condition": "{% for m in messages if m.role != 'tool' %}{{ loop.index }}" + TAIL,
    "a filter": "{% for m in messages | rejectattr('role', 'equalto', 'tool') %}" + TAIL,
    "empty test": "{% if messages %}" + HEAD + TAIL + "{% endif %}",
}
AHEAD = {
    "loop.last": HEAD + "{{ 'last' if loop.last }}" + TAIL,
    "loop.length": HEAD + "{{ loop.length }}" + TAIL,
    "loop.revindex": HEAD + "{{ loop.revindex0 }}" + TAIL,
    "loop.nextitem": HEAD + "{{ loop.nextitem.role if loop.nextitem }}" + TAIL,
    "loop['last']": HEAD + "{{ 'last' if loop['last'] }}" + TAIL,
    "messages[-1]": "{{ messages[-1].role }}" + HEAD + TAIL,
    "messages | last": "{{ (messages | last).role }}" + HEAD + TAIL,
    "messages | length": "{{ messages | length }}" + HEAD + TAIL,
    "count in the loop": HEAD + "{{ messages | count }}" + TAIL,
    "next message by index": HEAD + "{{ messages[loop.index].role if loop.index < 6 }}" + TAIL,
    "a slice": HEAD + "{{ messages[loop.index0:][0].role }}" + TAIL,
    "reversed": "{% for m in messages[::-1] %}{{ m.role }}{% endfor %}" + HEAD + TAIL,
    "a second loop": HEAD + "{{ m.role }}{% endfor %}" + HEAD + TAIL,
    "a filter before the loop": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}" + HEAD + TAIL,
    "map of roles": "{{ messages | map(attribute='role') | join }}" + HEAD + TAIL,
    "a loop in the loop": HEAD + "{% for n in messages %}{{ n.role }}{% endfor %}" + TAIL,
    "namespace after the loop": "{% set n = namespace(i=0) %}"
    + HEAD
    + "{% set n.i = loop.index %}"
    + TAIL
    + "{{ n.i }}",
    "namespace item after the loop": "{% set n = namespace(i=0) %}"
    + HEAD
    + "{% set n.i = 1 %}"
    + TAIL
    + "{{ n['i'] }}",
    "message after the loop": HEAD + TAIL + "{{ messages[0].role }}",
    "membership": "{{ messages[0] in messages }}" + HEAD + TAIL,
    "tojson of all": "{{ messages | string | length }}" + HEAD + TAIL,
    "compared": "{{ messages == [] }}" + HEAD + TAIL,
    "cycler": "{% set c = cycler('a', 'b') %}" + HEAD + "{{ c.next() }}" + TAIL + "{{ c.current }}",
    "loop over a filter": "{% for m in messages | rejectattr('role', 'equalto', 'tool') %}{{ loop.last }}" + TAIL,
    "loop with a condition": "{% for m in messages if m.role != 'tool' %}" + "{{ 'last' if loop.last }}" + TAIL,
    "the switch in the loop": HEAD + "{{ 'asked' if add_generation_prompt }}" + TAIL,
    "the switch in a macro": "{% macro shown(m) %}{{ add_generation_prompt }}{% endmacro %}"
    + HEAD
    + "{{ shown(m) }}"
    + TAIL,
    "the loop stops": HEAD + "{% if loop.index > 4 %}{% break %}{% endif %}" + TAIL,
    "groupby": "{% for g in messages | groupby('role') %}{{ g.grouper }}{% endfor %}" + HEAD + TAIL,
    "cycled over": "{{ messages | batch(2) | list | length }}" + HEAD + TAIL,
    "sliced by filter": "{{ messages | slice(2) | list | length }}" + HEAD + TAIL,
    "a copy": "{% set all = messages + [] %}{{ all | length }}" + HEAD + TAIL,
    "a list": "{% set all = messages | list %}{{ all[-1].role }}" + HEAD + TAIL,
    "set in the loop, read after": "{% set n = namespace(l=none) %}"
    + HEAD
    + "{% set n.l = m %}"
    + TAIL
    + "{{ n.l.content }}",
}


def rendered(source, messages=MESSAGES):
    return TrackedTemplate(Template(source, {}, place="t")).render(messages)


@pytest.mark.parametrize("name", [*BACK, *TEMPLATES])
def test_looking_back_is_one_rendering_for_all(name):
    """What the parts give is, for every turn, byte for byte what the template gives of the messages before it."""
    template = Template((BACK | TEMPLATES)[name], {"bos_token": "<s>", "eos_token": "</s>"}, place="t")
    found = TrackedTemplate(template).render(MESSAGES)
    assert found is not None
    for k in range(1, len(MESSAGES) + 1):
        asked = template.render(MESSAGES[:k], generation_prompt=True)
        told = template.render(MESSAGES[:k], generation_prompt=False)
        assert found.text[: found.ends[k - 1]] == told
        assert found.text[: found.ends[k - 1]] + found.header == asked
    assert len(found.ends) == len(MESSAGES)


@pytest.mark.parametrize("name", AHEAD)
def test_looking_ahead_is_noticed(name):
    """Anything that depends on what comes later makes the quick way impossible: turns are then rendered one by one."""
    assert rendered(AHEAD[name]) is None


@pytest.mark.parametrize("name", AHEAD)
def test_these_templates_run_at_all(name):
    """The templates above are refused for what they read, not because they fail."""
    assert Template(AHEAD[name], {}, place="t").render(MESSAGES, generation_prompt=True)


def test_failing_template_is_left_to_the_slow_way():
    """A template that refuses a row refuses it turn by turn, where the error has its place."""
    assert rendered("{{ raise_exception('no') }}") is None
    assert rendered(HEAD + TAIL, []) is None


def test_real_templates_that_only_look_back(shared_templates):
    """Qwen2.5, SmolLM2, Kimi-K2 and Phi look back only; Qwen3, gpt-oss and GLM look for the last question."""

    def quick(name):
        source = (shared_templates / f"{name}.jinja").read_text(encoding="utf-8")
        return TrackedTemplate(Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, place="t")).render(MESSAGES)

    back = ("Qwen-Qwen2.5-7B-Instruct", "HuggingFaceTB-SmolLM2-135M-Instruct", "moonshotai-Kimi-K2", "phi3")
    ahead = ("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "GLM-4.6", "Apertus-8B-Instruct")
    assert [name for name in back if quick(name) is None] == []
    assert [name for name in ahead if quick(name) is not None] == []
