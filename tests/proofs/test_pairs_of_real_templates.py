"""With every real template the prompt is what transformers serves, and the answer what its rendering goes on with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
from real_chats import (
    CONVERSATIONS,
    SPECIAL,
    control_tokens,
    probe,
    said,
    sources,
    template,
    write_sentencepiece,
    write_tokenizer,
)

from instil.chat.certificate import certify
from instil.chat.pairs import Pairs, make_examples
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions, TurnMaker
from instil.errors import InstilError
from instil.types import Conversation, Message

EOS, SENTENCE, IM = "</s>", "<｜end▁of▁sentence｜>", "<|im_end|>"
# What ends an answer, and what ends a turn that calls tools: read in each template and compared with what servers of
# the model stop at, by people. GLM's and gemma's servers stop at the header of what they want next.
ENDS: dict[str, tuple[str, str]] = {
    "Apertus-8B-Instruct": ("<|assistant_end|>", "<|assistant_end|>"),
    "Bielik-11B-v3.0-Instruct": (IM, IM),
    "ByteDance-Seed-OSS": ("<seed:eos>", "<seed:eos>"),
    "GLM-4.6": ("<|user|>", "<|observation|>"),
    "GLM-4.7-Flash": ("<|user|>", "<|observation|>"),
    "GigaChat3-10B-A1.8B": ("<|message_sep|>", "<|message_sep|>"),
    "HuggingFaceTB-SmolLM2-135M-Instruct": (IM, IM),
    "HuggingFaceTB-SmolLM3-3B": (IM, IM),
    "Kimi-K2-Instruct": (IM, IM),
    "MiMo-VL": (IM, IM),
    "Mistral-Small-3.2-24B-Instruct-2506": (EOS, EOS),
    "Qwen-QwQ-32B": (IM, IM),
    "Qwen-Qwen2.5-7B-Instruct": (IM, IM),
    "Qwen-Qwen3-0.6B": (IM, IM),
    "Qwen3-Coder": (IM, IM),
    "StepFun3.5-Flash": (IM, IM),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": (SENTENCE, SENTENCE),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": (SENTENCE, SENTENCE),
    "deepseek-ai-DeepSeek-V3.1": (SENTENCE, SENTENCE),
    "deepseek-ai-DeepSeek-V3.2": (SENTENCE, SENTENCE),
    "google-gemma-4-31B-it": ("<turn|>", "<|tool_response>"),
    "ibm-granite-granite-3.3-2B-Instruct": ("<|end_of_text|>", "<|end_of_text|>"),
    "llada_chat_template": ("<|eot_id|>", "<|eot_id|>"),
    "llama-cpp-deepseek-r1": (SENTENCE, SENTENCE),
    "llama-cpp-rwkv-world": ("\n\n", "\n\n"),
    "llava_next": (EOS, EOS),
    "microsoft-Phi-3.5-mini-instruct": ("<|end|>", "<|end|>"),
    "mistralai-Mistral-Nemo-Instruct-2407": (EOS, EOS),
    "moonshotai-Kimi-K2": (IM, IM),
    "openai-gpt-oss-120b": ("<|return|>", "<|call|>"),
    "phi3": ("<|end|>", "<|end|>"),
    "qwen2_5_vl": (IM, IM),
    "tulu-test-tokenizer": (EOS, EOS),
    "unsloth-Apriel-1.5": ("<|end|>", "<|end|>"),
    "unsloth-mistral-Devstral-Small-2507": (EOS, EOS),
}
# Where the tokenizer does not know <|end|>, the only control token left at the end of a conversation is the EOS.
ENDS_UNKNOWN = dict.fromkeys(["microsoft-Phi-3.5-mini-instruct", "phi3", "unsloth-Apriel-1.5"], (EOS, EOS))

THINK = "</think>"
# (template, its arguments): what the answer begins with before the content, where the stored turn does not go on from
# the prompt. "" = the prompt has closed the channel itself.
CHANNELS: dict[tuple[str, str], str] = {
    ("Qwen-QwQ-32B", ""): "",
    ("Qwen-QwQ-32B", "enable_thinking"): THINK,
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", ""): "",
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "enable_thinking"): THINK,
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", ""): THINK,
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "enable_thinking"): THINK,
    ("deepseek-ai-DeepSeek-V3.2", ""): "",
    ("deepseek-ai-DeepSeek-V3.2", "enable_thinking"): THINK,
    ("GLM-4.7-Flash", ""): THINK,
    ("GLM-4.7-Flash", "enable_thinking"): THINK,
    ("google-gemma-4-31B-it", ""): "",
    ("google-gemma-4-31B-it", "enable_thinking"): "",
    ("llama-cpp-deepseek-r1", ""): THINK,
    ("llama-cpp-deepseek-r1", "enable_thinking"): THINK,
    ("StepFun3.5-Flash", ""): "\n</think>\n",
    ("StepFun3.5-Flash", "enable_thinking"): "\n</think>\n",
}
# What the answers of the conversation "inline" are where the prompt opens the channel that the content opens too.
INLINE = {
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ["R-one\n</think>\n\nA-one.", "R-two\n</think>\n\nA-two."],
    "llama-cpp-deepseek-r1": ["R-one\n</think>\n\nA-one.", "R-two\n</think>\n\nA-two."],
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ["\n\nA-one.", "\n\nA-two."],  # closed, and the template drops it
}

BOTH = ("tools", "two calls")
REFUSED: dict[tuple[str, str], str] = {  # (template, conversation): part of the reason
    **{("MiroThinker", kind): "the template failed" for kind in CONVERSATIONS},
    ("Qwen-QwQ-32B", "inline"): "the prompt closes the reasoning channel",
    ("deepseek-ai-DeepSeek-V3.2", "inline"): "the prompt closes the reasoning channel",
    # Apertus writes an answer to a tool into the turn of the call, and its generation prompt opens another.
    **{("Apertus-8B-Instruct", kind): "rewrites the prompt" for kind in BOTH},
    # GigaChat writes text and call as two messages, each with its end.
    **{("GigaChat3-10B-A1.8B", kind): "which ends it, more than once" for kind in BOTH},
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "two calls"): "which ends it, more than once",
    # They write the calls and not the text before them.
    ("Mistral-Small-3.2-24B-Instruct-2506", "two calls"): "the content cannot be found",
    ("mistralai-Mistral-Nemo-Instruct-2407", "two calls"): "the content cannot be found",
    ("openai-gpt-oss-120b", "two calls"): "leaves out 'Bob'",  # one call a turn
    **{("Kimi-K2-Instruct", kind): "SecurityError" for kind in BOTH},
    **{("llama-cpp-deepseek-r1", kind): "not JSON serializable" for kind in BOTH},
    **{
        (name, kind): "leaves out 'look_up' of the tool calls" for kind in BOTH
        for name in (
            "HuggingFaceTB-SmolLM2-135M-Instruct", "HuggingFaceTB-SmolLM3-3B", "llada_chat_template", "llava_next",
            "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "ibm-granite-granite-3.3-2B-Instruct", "llama-cpp-rwkv-world",
            "microsoft-Phi-3.5-mini-instruct", "phi3", "qwen2_5_vl", "tulu-test-tokenizer",
        )
    },
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A tokenizer as we load it, and transformers' own of the same folder."""

    kind: str
    ours: Tokenizer
    theirs: Any


@pytest.fixture(scope="module", params=["known", "unknown"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """The templates' control tokens are control tokens, or plain text that the tokenizer has never heard of."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    ours = write_tokenizer(folder, control_tokens() if request.param == "known" else list(SPECIAL.values()))
    return Reader(request.param, ours, transformers.PreTrainedTokenizerFast.from_pretrained(folder))


@lru_cache(maxsize=512)
def made(ours: Tokenizer, name: str, kind: str, args: str = "") -> Pairs | str:
    """The pairs of a conversation with a template, or why there are none."""
    loaded = template(sources()[name], **({args: True} if args else {}))
    try:
        pairs = make_examples([CONVERSATIONS[kind]], ours, loaded)
    except InstilError as error:
        return str(error)
    return str(pairs.problems[0]) if pairs.problems else pairs


WANTS_PARTS = {"llava_next"}
# Writes an empty text turn after a call unless the content is null; transformers itself drops null contents, and fails.
NULL_CONTENT = {"deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"}


def sent(messages: Sequence[Message], name: str) -> list[dict[str, Any]]:
    """What a client would send: reasoning under both names in use, and contents in parts where only parts are taken."""
    found = []
    for message in messages:
        data = {"role": message.role, "content": message.content, **message.fields}
        if "reasoning_content" in data:
            data["thinking"] = data["reasoning_content"]
        if name in WANTS_PARTS:
            data["content"] = [{"type": "text", "text": message.content}]
        elif name in NULL_CONTENT and message.fields.get("tool_calls") and not message.content:
            data["content"] = None
        found.append(data)
    return found


def served(
    theirs: Any, name: str, messages: Sequence[Message], row: Conversation, *, ask: bool, tokenize: bool, args: str = ""
) -> Any:
    """transformers' own rendering."""
    chat, tools, more = sent(messages, name), list(row.tools) or None, {args: True} if args else {}
    if any(message["content"] is None for message in chat):
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template
        found, _ = render(
            [chat], tools=tools, chat_template=sources()[name], add_generation_prompt=ask, **SPECIAL, **more
        )
        text = str(found[0])
        return theirs(text, add_special_tokens=False)["input_ids"] if tokenize else text
    found = theirs.apply_chat_template(
        chat, chat_template=sources()[name], tools=tools, add_generation_prompt=ask, tokenize=tokenize, **more
    )
    return found["input_ids"] if tokenize else found


def answered(row: Conversation) -> list[int]:
    return [index for index, message in enumerate(row.messages) if message.role == "assistant"]


def end_of(name: str, message: Message, reader: Reader) -> str:
    table = ENDS | ENDS_UNKNOWN if reader.kind == "unknown" else ENDS
    return table[name][bool(message.fields.get("tool_calls"))]


def expected_answer(name: str, kind: str, turn: int, prompt: str, whole: str, row: Conversation, end: str) -> str:
    """What must follow the prompt, by transformers' rendering through the turn, or by the tables above."""
    index = answered(row)[turn]
    message, question = row.messages[index], row.messages[index - 1]
    if whole.startswith(prompt):
        rest = whole[len(prompt) :]
        at = rest.find(end)
        return rest[: at + len(end)] if at >= 0 else rest + end
    if kind == "inline" and name in INLINE:
        return INLINE[name][turn] + end
    if (name, "") in CHANNELS:
        asked = whole.rfind(question.content.strip()) + len(question.content.strip())
        shown = [message.content] if message.content in whole else [message.content.strip()]
        starts = [whole.find(text, asked) for text in (*shown, *CALLS) if text]
        start = min(at for at in starts if at >= 0)
        at = whole.find(end, start)
        thought = f"{message.fields.get('reasoning_content', '')}</think>"
        opened = thought if len(thought) > len(THINK) and thought in whole else CHANNELS[name, ""]
        return opened + (whole[start : at + len(end)] if at >= 0 else whole[start:] + end)
    assert name == "mistralai-Mistral-Nemo-Instruct-2407", f"{name} rewrites the prompt of {kind!r}"
    return message.content + end  # its system prompt moves to the last question, which an answer ends


CALLS = ("<｜tool▁calls▁begin｜>", "\n\n<｜DSML｜function_calls>", "<tool_call>", "<|tool_call>")


def names() -> list[str]:
    return list(sources())


def accepted(reader: Reader, kind: str) -> list[tuple[str, Pairs]]:
    found = [(name, made(reader.ours, name, kind)) for name in names()]
    return [(name, pairs) for name, pairs in found if isinstance(pairs, Pairs)]


def test_tables_cover_the_templates() -> None:
    """Each renderable template has its ends written down by hand, and nothing else has."""
    assert ENDS.keys() == set(names()) - {"MiroThinker"}


@pytest.mark.parametrize("kind", ["two turns", "edges", "reasoning", "ten turns"])
def test_almost_every_template_is_followed(reader: Reader, kind: str) -> None:
    """35 of 36 templates give pairs of conversations without tools; nobody can render the other one."""
    assert len(accepted(reader, kind)) >= 35


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_refused_is_what_the_table_says(reader: Reader, kind: str) -> None:
    """A conversation is refused exactly where the table names a reason, and for that reason."""
    for name in names():
        found, reason = made(reader.ours, name, kind), REFUSED.get((name, kind))
        if reason is None:
            assert isinstance(found, Pairs), f"{name}: {found}"
        else:
            assert isinstance(found, str), f"{name} gives pairs of {kind!r}"
            assert reason in found, name


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_prompts_are_what_transformers_serves(reader: Reader, kind: str) -> None:
    """The prompt of each turn is transformers' rendering of the messages before it, token by token."""
    row = CONVERSATIONS[kind]
    for name, pairs in accepted(reader, kind):
        assert len(pairs.examples) == len(answered(row)), name
        for index, example in zip(answered(row), pairs.examples, strict=True):
            theirs = served(reader.theirs, name, row.messages[:index], row, ask=True, tokenize=True)
            assert example.prompt_tokens.tolist() == theirs, f"{name}, message {index}"


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_answers_are_what_the_rendering_goes_on_with(reader: Reader, kind: str) -> None:
    """Prompt and answer spell transformers' rendering through the end of the turn; where a channel is opened, by hand."""
    row = CONVERSATIONS[kind]
    for name, pairs in accepted(reader, kind):
        for turn, (index, example) in enumerate(zip(answered(row), pairs.examples, strict=True)):
            prompt = served(reader.theirs, name, row.messages[:index], row, ask=True, tokenize=False)
            whole = served(reader.theirs, name, row.messages[: index + 1], row, ask=False, tokenize=False)
            message = row.messages[index]
            end = end_of(name, message, reader)
            answer = expected_answer(name, kind, turn, prompt, whole, row, end)
            tokens = [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]
            assert reader.theirs.decode(example.answer_tokens) == answer, f"{name}, message {index}"
            assert reader.theirs.decode(tokens) == prompt + answer, f"{name}, message {index}"
            known = reader.ours.control_tokens.get(end)
            assert known is None or example.answer_tokens.tolist().index(known) == len(example.answer_tokens) - 1
            assert (example.weights == 1).all()


def test_terminators_are_those_of_the_table(reader: Reader) -> None:
    """What ends an answer is found in the template, and is what people found there."""
    for name, pairs in accepted(reader, "two turns"):
        assert [ending.text for ending in pairs.terminators] == [end_of(name, said("assistant", "x"), reader)], name
    for name, pairs in accepted(reader, "tools"):
        text, call = (
            end_of(name, message, reader) for message in (said("assistant", ""), CONVERSATIONS["tools"].messages[1])
        )
        assert [ending.text for ending in pairs.terminators] == list(dict.fromkeys([text, call])), name


@pytest.mark.parametrize(("name", "args"), CHANNELS)
def test_answers_close_the_channel_that_the_prompt_opens(reader: Reader, name: str, args: str) -> None:
    """The beginning of the answer is the one written down, with and without enable_thinking; prompts are transformers'."""
    row, pairs = CONVERSATIONS["two turns"], made(reader.ours, name, "two turns", args)
    assert isinstance(pairs, Pairs), pairs
    for index, example in zip(answered(row), pairs.examples, strict=True):
        theirs = served(reader.theirs, name, row.messages[:index], row, ask=True, tokenize=True, args=args)
        assert example.prompt_tokens.tolist() == theirs
        answer = CHANNELS[name, args] + row.messages[index].content + ENDS[name][0]
        assert reader.theirs.decode(example.answer_tokens) == answer


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_certificate_finds_no_fault(reader: Reader, kind: str) -> None:
    """The second derivation agrees with every pair, nearly always by its own way."""
    row = CONVERSATIONS[kind]
    for name, pairs in accepted(reader, kind):
        certificate, problems = certify(pairs.examples, [row], reader.ours, template(sources()[name]), {})
        assert problems == [], name
        assert certificate["by_edit"] + certificate["by_rendering"] == len(pairs.examples) == certificate["examples"]
        assert certificate["by_edit"] == len(pairs.examples), f"{name} is certified by rendering only"


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_one_rendering_for_all_turns_is_a_rendering_for_each(reader: Reader, kind: str) -> None:
    """The quick way, one watched rendering of the whole row, gives byte for byte the texts of the slow way."""
    row, quick = CONVERSATIONS[kind], 0
    for name, _ in accepted(reader, kind):
        maker = TurnMaker(reader.ours, template(sources()[name]), ChatOptions())
        turns, problems = maker.turns(row)
        assert problems == [], name
        numbered = maker.numbered(row)
        for turn, index in zip(turns, answered(row), strict=True):
            slow = maker.slow(numbered, index)
            assert (turn.prompt, turn.body, turn.terminator) == (slow.prompt, slow.body, slow.terminator), name
            assert turn.spans == slow.spans, name
        quick += maker.appends(row)
    assert quick >= (3 if row.tools else 13)  # so the quick way is really taken


@pytest.mark.parametrize("kind", ["two turns", "edges", "reasoning", "tools"])
def test_tokenizers_that_add_a_space_are_followed(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Pieces with a space put before each text, as in Llama 2: prompts are transformers', and the certificate agrees."""
    monkeypatch.setattr("instil.chat.ids.LIBRARY_EVERY", 1)  # not a sample only
    transformers = pytest.importorskip("transformers")
    folder, row = tmp_path_factory.mktemp("pieces"), CONVERSATIONS[kind]
    ours = write_sentencepiece(folder, control_tokens())
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for name, pairs in accepted(Reader("pieces", ours, theirs), kind):
        for index, example in zip(answered(row), pairs.examples, strict=True):
            prompt = served(theirs, name, row.messages[:index], row, ask=True, tokenize=True)
            assert example.prompt_tokens.tolist() == prompt, f"{name}, message {index}"
            content = row.messages[index].content.strip()
            assert content in theirs.decode(example.answer_tokens), f"{name}, message {index}"
        certificate, problems = certify(pairs.examples, [row], ours, template(sources()[name]), {})
        assert problems == [], name
        assert certificate["by_edit"] == certificate["by_library"] == len(pairs.examples), name


def test_probe_agrees(reader: Reader) -> None:
    """index.json was measured with transformers alone: what it says of prefixes is what the pairs show."""
    for name, pairs in accepted(reader, "two turns"):
        found = probe(name)
        if not found["renders_two_turns"]:
            continue
        closed = sum(pairs.notes.get(note, 0) for note in ("channels_closed", "channels_closed_by_prompt"))
        if found["generation_prefix_holds"][1]:  # of the last turn, through which both render
            assert closed < 2, name
        assert (found["generation_prefix_holds"] == [False, False]) == (closed == 2), name
        assert not pairs.merged_boundaries, name


@pytest.mark.parametrize("change", [lambda text: text, str.upper])
def test_tools_are_in_the_prompt_where_the_probe_says_so(reader: Reader, change: Callable[[str], str]) -> None:
    """A template that shows tools and results to the model shows ours, in every prompt after they are known."""
    for name, pairs in accepted(reader, "tools"):
        if probe(name)["tools"]:
            texts = [change(reader.theirs.decode(example.prompt_tokens)) for example in pairs.examples]
            assert change("Ada L.") in texts[1], name
            shown = [bool(re.search(change("look_up"), text)) for text in texts]
            assert any(shown), name
