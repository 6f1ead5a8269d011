"""An example is the server's prompt and the answer through its end, or the row is refused with the reason."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from chat_samples import CHATML, CONTROL, LLAMA3, MISTRAL, SPACED, TEMPLATES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instil.chat.certificate import certify
from instil.chat.endings import Endings
from instil.chat.pairs import make_examples, served_prompt
from instil.chat.template import Template, load_template
from instil.chat.tokenizer import load_tokenizer
from instil.chat.turns import ChatOptions, TurnMaker
from instil.errors import InstilError, TemplateError
from instil.types import Conversation, Message

U, A, S = (lambda text, role=role: Message(role, text) for role in ("user", "assistant", "system"))
TWO_TURNS = Conversation(
    (U("Hello world"), A("[[1,2],[3,4]]"), U("Again? 👋🏽"), A("yes. The answer")), "train.jsonl:1", (), "lists"
)
WITH_SYSTEM = Conversation((S("Be kind."), U("Hi"), A("Hello")), "train.jsonl:2")
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"who": "Ada"}}}
WITH_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(folder, override=None):
    return load_tokenizer(folder), load_template(folder, override)


def template_of(source):
    return Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, place="mine.jinja")


def chat(messages):
    return [message.as_dict() for message in messages]


def test_prompts_are_what_transformers_serves(folder, oracle):
    """Each prompt is what the server computes from the messages before the answer, and nothing else."""
    tokenizer, template = load(folder)
    examples = make_examples([TWO_TURNS, WITH_SYSTEM], tokenizer, template).examples
    prompts = [TWO_TURNS.messages[:1], TWO_TURNS.messages[:3], WITH_SYSTEM.messages[:2]]
    assert len(examples) == len(prompts)
    for example, messages in zip(examples, prompts, strict=True):
        served = oracle(folder).apply_chat_template(chat(messages), add_generation_prompt=True)["input_ids"]
        assert example.prompt_tokens.tolist() == served == served_prompt(messages, tokenizer, template).tolist()


def test_answers_spell_the_content_and_stop(chatml):
    """An answer is the content and the token that ends it; the line break after that is not the model's to write."""
    tokenizer, template = load(chatml)
    pairs = make_examples([TWO_TURNS, WITH_SYSTEM], tokenizer, template)
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    assert texts == ["[[1,2],[3,4]]<|im_end|>", "yes. The answer<|im_end|>", "Hello<|im_end|>"]
    assert pairs.problems == []
    assert pairs.merged_boundaries == 0


def test_each_assistant_turn_is_one_example(folder):
    """A row with two answers gives two examples, in order, that know their row."""
    tokenizer, template = load(folder)
    examples = make_examples([TWO_TURNS, WITH_SYSTEM], tokenizer, template).examples
    rows = [(example.origin, example.turn, example.task) for example in examples]
    assert rows == [("train.jsonl:1", 0, "lists"), ("train.jsonl:1", 1, "lists"), ("train.jsonl:2", 0, "")]
    for example in examples:
        assert example.prompt_tokens.dtype == example.answer_tokens.dtype == np.int32
        assert example.weights.dtype == np.float32
        assert example.weights.tolist() == [1.0] * len(example.answer_tokens)


def test_an_answer_of_weight_zero_is_context_only(chatml):
    """weight 0 on an assistant message: in the later prompt, never a target; weight 0.5 counts half."""
    tokenizer, template = load(chatml)
    messages = (U("one"), Message("assistant", "not this", {"weight": 0}), U("two"),
                Message("assistant", "this", {"weight": 0.5}))  # fmt: skip
    (example,) = make_examples([Conversation(messages, "a:1")], tokenizer, template).examples
    assert example.turn == 1
    assert "not this<|im_end|>" in tokenizer.decode(example.prompt_tokens)
    assert tokenizer.decode(example.answer_tokens) == "this<|im_end|>"
    assert example.weights.tolist() == [0.5] * len(example.answer_tokens)


def test_first_answer_is_in_the_second_prompt(chatml):
    """The prompt of a later turn holds the earlier answers, ended as the template ends them."""
    tokenizer, template = load(chatml)
    _, second = make_examples([TWO_TURNS], tokenizer, template).examples
    assert tokenizer.decode(second.prompt_tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello world<|im_end|>\n"
        "<|im_start|>assistant\n[[1,2],[3,4]]<|im_end|>\n<|im_start|>user\nAgain? 👋🏽<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "content", ["[[1,2],[3,4]]", "```\ncode\n```", "-", "<b>&</b>", "0", "assistant\n", " two  ", "\n\n"]
)
def test_edge_characters_of_an_answer_are_kept(chatml, content):
    """The first and last character of a content are learnt, whatever they are."""
    tokenizer, template = load(chatml)
    (example,) = make_examples([Conversation((U("x"), A(content)), "a:1")], tokenizer, template).examples
    assert tokenizer.decode(example.answer_tokens) == content + "<|im_end|>"


def test_stop_token_is_a_target(folder):
    """The token that ends an answer is learnt, so the model stops."""
    tokenizer, template = load(folder)
    terminator = Endings(template, tokenizer).plain
    for example in make_examples([TWO_TURNS, WITH_SYSTEM], tokenizer, template).examples:
        assert example.answer_tokens[-1] == terminator.token_id
        assert example.answer_tokens.tolist().count(terminator.token_id) == 1
        assert example.weights[-1] > 0


@pytest.mark.parametrize(("name", "text"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")])
def test_terminator_is_read_from_the_template(make_folder, name, text):
    """The token that ends an answer comes from the template, not from a table of families."""
    tokenizer, template = load(make_folder(TEMPLATES[name]))
    terminator = Endings(template, tokenizer).plain
    assert (terminator.text, terminator.token_id) == (text, tokenizer.control_tokens[text])


@pytest.mark.parametrize("source", [CHATML, MISTRAL])
def test_pad_equal_to_eos_does_not_matter(make_folder, source):
    """A pad token that is also the end token takes nothing away from the targets."""
    apart, same = make_folder(source), make_folder(source, pad_token="</s>")
    one, two = (make_examples([TWO_TURNS], *load(folder)).examples for folder in (apart, same))
    for left, right in zip(one, two, strict=True):
        assert left.prompt_tokens.tolist() == right.prompt_tokens.tolist()
        assert left.answer_tokens.tolist() == right.answer_tokens.tolist()
        assert left.weights.tolist() == right.weights.tolist()


def test_template_that_trims_is_taken(make_folder):
    """A template that strips the content is followed: the answer is what the model will see again later."""
    tokenizer, template = load(make_folder(LLAMA3))
    (example,) = make_examples([Conversation((U("x"), A("  yes \n")), "a:1")], tokenizer, template).examples
    assert tokenizer.decode(example.answer_tokens) == "yes<|eot_id|>"


def test_text_that_the_template_adds_belongs_to_the_answer(chatml):
    """What the template writes before the content, after the prompt, is for the model to emit."""
    source = CHATML.replace(
        "{{ message.content }}",
        "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
    )
    tokenizer = load_tokenizer(chatml)
    (example,) = make_examples([Conversation((U("x"), A("think")), "a:1")], tokenizer, template_of(source)).examples
    assert tokenizer.decode(example.answer_tokens) == "<think>\n\n</think>\n\nthink<|im_end|>"


def test_merged_boundary_keeps_the_served_prompt(make_folder, oracle):
    """Where a token would span prompt and answer, the prompt stays the server's and the text stays the same."""
    folder = make_folder(SPACED)
    tokenizer, template = load(folder)
    pairs = make_examples([Conversation((U("x"), A("Hello world")), "a:1")], tokenizer, template)
    (example,) = pairs.examples
    assert pairs.merged_boundaries == 1
    served = oracle(folder).apply_chat_template(chat([U("x")]), add_generation_prompt=True)["input_ids"]
    assert example.prompt_tokens.tolist() == served
    joint = tokenizer.encode("user: x<|im_end|>\nassistant: Hello world<|im_end|>")
    assert joint[: len(served)] != served
    assert tokenizer.decode(example.answer_tokens) == "Hello world<|im_end|>"


def test_tool_calls_are_answers(chatml):
    """An assistant turn that calls a tool is learnt through the same end token as any other."""
    tokenizer, template = load_tokenizer(chatml), template_of(WITH_CALLS)
    messages = (U("Who?"), Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "Ada"), A("Ada."))
    pairs = make_examples([Conversation(messages, "a:1")], tokenizer, template)
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    call = '<tool_call>{"name": "look_up", "arguments": {"who": "Ada"}}</tool_call><|im_end|>'
    assert texts == [call, "Ada.<|im_end|>"]


def test_lost_tool_call_is_refused(chatml):
    """A template that ignores tool calls must not turn them into empty answers."""
    tokenizer, template = load(chatml)
    rows = [WITH_SYSTEM, Conversation((U("Who?"), Message("assistant", "", {"tool_calls": [CALL]})), "a:1")]
    pairs = make_examples(rows, tokenizer, template)
    assert [example.origin for example in pairs.examples] == ["train.jsonl:2"]
    assert "a:1: messages[1]: the template leaves out 'look_up' of the tool calls" in str(pairs.problems[0])


def test_tool_call_may_have_another_end(chatml):
    """A tool call that ends with another token than plain answers is learnt through that token."""
    source = WITH_CALLS.replace("<|im_end|>", "{{ '<|eot_id|>' if m.tool_calls else '<|im_end|>' }}")
    messages = (U("Who?"), Message("assistant", "", {"tool_calls": [CALL]}), Message("tool", "Ada"), A("Ada."))
    tokenizer = load_tokenizer(chatml)
    pairs = make_examples([Conversation(messages, "a:1")], tokenizer, template_of(source))
    texts = [tokenizer.decode(example.answer_tokens) for example in pairs.examples]
    call = '<tool_call>{"name": "look_up", "arguments": {"who": "Ada"}}</tool_call><|eot_id|>'
    assert texts == [call, "Ada.<|im_end|>"]
    assert [ending.text for ending in pairs.terminators] == ["<|im_end|>", "<|eot_id|>"]


def test_tool_call_with_two_ends_is_refused(chatml):
    """A turn in which the end token stands twice is refused as ambiguous."""
    source = WITH_CALLS.replace("<tool_call>", "<|im_end|><tool_call>")
    call = Conversation((U("Who?"), Message("assistant", "look_up", {"tool_calls": [CALL]})), "a:1")
    pairs = make_examples([WITH_SYSTEM, call], load_tokenizer(chatml), template_of(source))
    assert [problem.rule for problem in pairs.problems] == ["ambiguous-terminator"]
    assert "'<|im_end|>', which ends it, more than once" in str(pairs.problems[0])


def test_lost_argument_of_a_call_is_refused(chatml):
    """The names of calls are not enough: each text among the arguments is in the answer, or the row is refused."""
    source = WITH_CALLS.replace("c.function | tojson", "c.function.name")
    call = Conversation((U("Who?"), Message("assistant", "", {"tool_calls": [CALL]})), "a:1")
    pairs = make_examples([WITH_SYSTEM, call], load_tokenizer(chatml), template_of(source))
    assert "the template leaves out 'who' of the tool calls" in str(pairs.problems[0])


def test_calls_without_ids_are_numbered_where_the_template_reads_ids(chatml):
    """Calls of a row that has no ids get them in order, the results theirs, and the row's own ids are kept."""
    source = WITH_CALLS.replace("<tool_call>", "<tool_call>{{ c.id }} ").replace(
        "{{ m.content }}", "{{ m.tool_call_id ~ ' ' if m.tool_call_id }}{{ m.content }}"
    )
    calls = [CALL, CALL | {"id": "mine"}, CALL]
    results = (Message("tool", "one"), Message("tool", "two"), Message("tool", "three"))
    messages = (U("Who?"), Message("assistant", "", {"tool_calls": calls}), *results, A("Ada."))
    pairs = make_examples([Conversation(messages, "a:1")], load_tokenizer(chatml), template_of(source))
    call, answer = (load_tokenizer(chatml).decode(example.prompt_tokens.tolist() + example.answer_tokens.tolist())
                    for example in pairs.examples)  # fmt: skip
    assert re.findall(r"<tool_call>(\S+) ", call) == ["call00000", "mine", "call00002"]
    assert re.findall(r"tool\n(\S+) (\S+)<", answer) == [
        ("call00000", "one"), ("mine", "two"), ("call00002", "three")
    ]  # fmt: skip
    assert pairs.notes["rows_with_numbered_calls"] == 1
    plain = make_examples([Conversation(messages, "a:1")], load_tokenizer(chatml), template_of(WITH_CALLS))
    assert "rows_with_numbered_calls" not in plain.notes


CONTENT = "{{ message.content }}"
USERS_ONLY = "{% if message.role == 'user' %}{{ message.content }}{% endif %}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            CHATML.replace("role }}", "role }}{{ ' now' if loop.last }}"),
            r"rewrites the prompt .* character \d+ on, ' now",
        ),
        (CHATML.replace(CONTENT, USERS_ONLY), "the assistant's content 0 times"),
        (CHATML.replace(CONTENT, CONTENT * 2), "the assistant's content 2 times"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            "nothing after an answer that ends it.*chat.terminator=TEXT",
        ),
        (CHATML.replace(CONTENT, "<|im_end|>" + CONTENT), "more than once"),
        ("{{ bos_token }}" + LLAMA3, "the prompt begins with '<s>' twice"),
        ("{{ raise_exception('never') }}", "the template refuses these messages: never"),
    ],
)
def test_refused_template_names_the_reason(chatml, source, reason):
    """A template that cannot be followed is refused at once, with the reason and the first row."""
    with pytest.raises(TemplateError, match=reason) as refused:
        make_examples([TWO_TURNS, WITH_SYSTEM], load_tokenizer(chatml), template_of(source))
    assert "train.jsonl:1" in str(refused.value)


def test_template_that_trips_over_one_row_loses_that_row(chatml):
    """A row that the template itself refuses is reported with its place; the others are used."""
    source = CHATML + "{% if messages[0].content == 'bad' %}{{ raise_exception('bad start') }}{% endif %}"
    rows = [TWO_TURNS, Conversation((U("bad"), A("x")), "a:7")]
    pairs = make_examples(rows, load_tokenizer(chatml), template_of(source))
    assert len(pairs.examples) == 2
    assert re.match(r"a:7: messages\[1\]: the template refuses these messages: bad start", str(pairs.problems[0]))


def test_changed_content_is_refused(chatml):
    """A content that the template alters is refused: what is learnt must be what the row says."""
    source = CHATML.replace("{{ message.content }}", "{{ message.content | replace('why', 'because') }}")
    rows = [TWO_TURNS, Conversation((U("x"), A("That is why")), "a:7")]
    pairs = make_examples(rows, load_tokenizer(chatml), template_of(source))
    assert "a:7: messages[1]: the content cannot be found" in str(pairs.problems[0])


def test_removed_reasoning_is_counted(chatml):
    """A template that leaves out reasoning is followed: the server would not write it either; it is said how often."""
    source = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    rows = [TWO_TURNS, Conversation((U("x"), A("<think>why</think>yes")), "a:7")]
    tokenizer = load_tokenizer(chatml)
    pairs = make_examples(rows, tokenizer, template_of(source))
    assert (pairs.problems, pairs.notes) == ([], {"reasoning_left_out": 1})
    assert tokenizer.decode(pairs.examples[-1].answer_tokens) == "yes<|im_end|>"


def test_reasoning_that_is_only_set_otherwise_is_not_counted_as_left_out(chatml):
    """Where the template writes inline reasoning with other breaks around it, it is learnt, and nothing is noted."""
    source = CHATML.replace("{{ message.content }}", "{{ message.content | replace('<think>', '<think>\n') }}")
    row = Conversation((U("x"), A("<think>why</think>yes")), "a:7")
    tokenizer = load_tokenizer(chatml)
    pairs = make_examples([row], tokenizer, template_of(source))
    assert (pairs.problems, pairs.notes) == ([], {})
    assert tokenizer.decode(pairs.examples[-1].answer_tokens) == "<think>\nwhy</think>yes<|im_end|>"


DROPS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_history_is_as_the_server_writes_it(chatml):
    """Reasoning is learnt in its own turn and absent from the prompt of the next, where the template removes it."""
    first, second = (Message("assistant", text, {"reasoning_content": why}) for text, why in (("a", "r"), ("b", "s")))
    tokenizer = load_tokenizer(chatml)
    pairs = make_examples([Conversation((U("x"), first, U("y"), second), "a:1")], tokenizer, template_of(DROPS))
    one, two = pairs.examples
    assert tokenizer.decode(one.answer_tokens) == "<think>r</think>a<|im_end|>"
    assert tokenizer.decode(two.prompt_tokens).endswith("assistant\na<|im_end|>\n<|im_start|>user\ny<|im_end|>\n"
                                                        "<|im_start|>assistant\n")  # fmt: skip
    assert tokenizer.decode(two.answer_tokens) == "<think>s</think>b<|im_end|>"


@pytest.mark.parametrize("where", [0, 1, 2])
def test_typed_control_tokens_are_problems_where_that_is_asked_for(chatml, where):
    """chat.control_text=reject: a row that types a control token is refused, by place."""
    messages = [S("s"), U("u"), A("a")]
    messages[where] = dataclasses.replace(messages[where], content="stop <|im_end|> here")
    rows, options = [TWO_TURNS, Conversation(tuple(messages), "a:9")], ChatOptions(control_text="reject")
    pairs = make_examples(rows, *load(chatml), options)
    assert len(pairs.examples) == 2
    expected = f"a:9: messages[{where}].content: contains the control token '<|im_end|>' as text; remove it"
    assert [str(problem)[: len(expected)] for problem in pairs.problems] == [expected]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_typed_control_tokens_are_plain_text(chatml, where):
    """Text from data never becomes a control token: by default it is the text that it is."""
    messages = [S("s"), U("u"), A("a")]
    messages[where] = dataclasses.replace(messages[where], content="stop <|im_end|> here")
    tokenizer, template = load(chatml)
    pairs = make_examples([Conversation(tuple(messages), "a:9")], tokenizer, template)
    (example,), end = pairs.examples, tokenizer.control_tokens["<|im_end|>"]
    tokens = [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]
    assert tokens.count(end) == 3  # one for each message
    assert tokenizer.decode(tokens).count("<|im_end|>") == 4
    assert pairs.notes == {"typed_control_tokens": 1}
    assert example.answer_tokens.tolist().count(end) == 1


@pytest.mark.parametrize(
    ("messages", "reason"),
    [((U("x"),), "a:1: no assistant turn"), ((A("hi"), U("x"), A("y")), r"messages\[0\]: an answer to nothing")],
)
def test_rows_without_a_pair_are_problems(chatml, messages, reason):
    """A row that holds no prompt or no answer is reported, not skipped."""
    pairs = make_examples([Conversation(messages, "a:1")], *load(chatml))
    assert pairs.examples == []
    assert re.search(reason, str(pairs.problems[0]))


def test_no_rows_give_no_examples(chatml):
    """Nothing in, nothing out."""
    assert make_examples([], *load(chatml)).examples == []


def test_many_rows_are_the_rows_one_by_one(folder):
    """Tokenising thousands of rows together gives what each row gives alone, in order."""
    tokenizer, template = load(folder)
    rows = [
        Conversation((U(f"{i} Hello"), A(f"answer {i * i}"), U("x"), A("y " * (i % 7 + 1))), f"a:{i}")
        for i in range(1100)
    ]
    examples = make_examples(rows, tokenizer, template).examples
    assert [(example.origin, example.turn) for example in examples] == [
        (row.origin, turn) for row in rows for turn in (0, 1)
    ]
    for index in (0, 511, 512, 1099):
        alone = make_examples([rows[index]], tokenizer, template).examples
        for one, other in zip(examples[2 * index : 2 * index + 2], alone, strict=True):
            assert one.prompt_tokens.tolist() == other.prompt_tokens.tolist()
            assert one.answer_tokens.tolist() == other.answer_tokens.tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=4, max_size=4))
def test_any_text_survives(folder, contents):
    """Whatever is written, prompt and answer together spell the rendering and the answer spells the content."""
    tokenizer, template = load(folder)
    first, answer, second, last = contents
    row = Conversation((U(first), A(answer), U(second), A(last)), "a:1")
    pairs = make_examples([row], tokenizer, template)
    assert not pairs.problems
    for index, example in zip((1, 3), pairs.examples, strict=True):
        whole = template.render(row.messages[: index + 1], generation_prompt=False)
        spelt = tokenizer.decode(example.prompt_tokens) + tokenizer.decode(example.answer_tokens)
        assert whole.startswith(spelt)
        assert not whole[len(spelt) :].strip()
        assert row.messages[index].content.strip() in tokenizer.decode(example.answer_tokens)


REAL_REFUSED = {"MiroThinker"}  # of the 36 templates: it fails in transformers too
CONTROL_LIKE = r"<[|｜][^<>{}'\" ]+?[|｜]>|</?s>|<turn\|>|<seed:[a-z]+>|\[/?[A-Z_]+\]"


@pytest.fixture(scope="module")
def real(shared_templates, make_folder):
    """The sources of the real templates, and a model folder whose tokenizer knows their control tokens."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(shared_templates.glob("*.jinja"))}
    written = sorted(set(re.findall(CONTROL_LIKE, "".join(sources.values()))))
    return sources, make_folder(control=tuple(dict.fromkeys([*CONTROL, *written])))


def test_real_templates_are_followed_or_refused_with_a_reason(real):
    """All but the one that nobody can render are followed (tests/proofs looks at what they give)."""
    sources, folder = real
    tokenizer, refused = load_tokenizer(folder), {}
    for name, source in sources.items():
        try:
            pairs = make_examples([TWO_TURNS], tokenizer, template_of(source))
            assert len(pairs.examples) == 2, name
        except TemplateError as error:
            refused[name] = str(error)
    assert refused.keys() == REAL_REFUSED & sources.keys()
    assert all("the template failed" in text for text in refused.values())


BEHIND = "{{ message.content }}{{ message.tool_calls | tojson if message.tool_calls }}"
LOOSE = {**TEMPLATES, "drops": DROPS, "calls": WITH_CALLS, "chatml with calls": CHATML.replace(CONTENT, BEHIND)}
texts = st.text(st.characters(codec="utf-8"), max_size=20)
typing = st.sampled_from(["<|im_end|>", "</s>", "<s> x", "<|im_start|>user\n", "[INST]", "<think>a</think>", " ", ""])
contents = st.one_of(texts, typing, st.tuples(texts, typing, texts).map("".join))
calls = st.lists(st.builds(
    lambda name, value: {"type": "function", "function": {"name": name or "f", "arguments": {"x": value}}},
    st.text("abc_", max_size=5), st.one_of(contents, st.integers(), st.lists(contents, max_size=2)),
), min_size=1, max_size=2)  # fmt: skip
fields = st.fixed_dictionaries({}, optional={
    "weight": st.sampled_from([0, 0.5, 1, 2]), "tool_calls": calls, "reasoning_content": contents,
    "name": st.text("ab", max_size=3),
})  # fmt: skip
messages = st.builds(
    Message, st.sampled_from(["system", "user", "user", "assistant", "assistant", "tool"]), contents, fields
)
tools = st.sampled_from([(), ({"type": "function", "function": {"name": "f", "description": "a <|im_end|> b"}},)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(messages, max_size=6), tools, st.sampled_from([0.5, 1.0]), st.sampled_from(sorted(LOOSE)),
    st.sampled_from(["plain", "reject"]),
)  # fmt: skip
def test_any_conversation_gives_certified_examples_or_problems(chatml, messages, tools, weight, name, control_text):
    """Whatever a row holds: examples that the certificate accepts, or problems; and every token is accounted for."""
    tokenizer, template = load_tokenizer(chatml), template_of(LOOSE[name])
    row = Conversation(tuple(messages), "a:1", tools, weight=weight)
    options = ChatOptions(control_text=control_text)
    rows = [TWO_TURNS, row]
    try:
        pairs = make_examples(rows, tokenizer, template, options)
    except InstilError:  # the template is what is wrong
        return
    certificate, faults = certify(pairs.examples, rows, tokenizer, template, {}, options)
    assert faults == []
    assert certificate["by_edit"] + certificate["by_rendering"] == certificate["examples"] == len(pairs.examples)
    assert all(problem.place.startswith("a:1") for problem in pairs.problems)
    mine = [example for example in pairs.examples if example.origin == "a:1"]
    assert not (mine and pairs.problems)
    learnt = [i for i, m in enumerate(messages) if m.role == "assistant" and m.weight > 0]
    assert len(mine) == (0 if pairs.problems else len(learnt))
    maker = TurnMaker(tokenizer, template, options)
    for index, example in zip(learnt, mine, strict=False):
        assert example.weights.tolist() == [messages[index].weight * weight] * len(example.answer_tokens)
        if control_text == "reject":  # so nothing is typed, and the definition can be written down in two lines
            turn = maker.slow(maker.numbered(row), index)
            prompt, both = (len(tokenizer.encode(text)) for text in (turn.prompt, turn.prompt + turn.answer))
            assert len(example.prompt_tokens) == prompt
            assert len(example.prompt_tokens) + len(example.answer_tokens) == both or pairs.merged_boundaries


def test_reasoning_after_a_prompt_that_closes_the_channel_says_how_to_open_it(chatml):
    """The remedy is the switch that opens the channel, not another template; without reasoning the row is fine."""
    turn = "<think>\n{{ message.reasoning_content }}\n</think>\n\n{{ message.content }}"
    source = CHATML.replace("{{ message.content }}", "{% if message.role == 'assistant' %}" + turn + "{% else %}"
                            "{{ message.content }}{% endif %}").removesuffix("{% endif %}")  # fmt: skip
    closed = template_of(source + "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
    tokenizer = load_tokenizer(chatml)
    with pytest.raises(TemplateError, match=r"closes the reasoning channel.*enable_thinking: true"):
        make_examples(
            [Conversation((U("x"), Message("assistant", "y", {"reasoning_content": "hm"})), "a:1")], tokenizer, closed
        )
    (example,) = make_examples([Conversation((U("x"), A("y")), "a:2")], tokenizer, closed).examples
    assert tokenizer.decode(example.answer_tokens) == "y<|im_end|>"
