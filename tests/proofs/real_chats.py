"""Real chat templates, conversations of several kinds, and two kinds of tokenizers for the proofs of the chat stage."""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1] / "chat"))
from chat_samples import CONTROL, LINES, SHARED, train_tokenizer

from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer, load_tokenizer
from instil.types import Conversation, Message

# What people would call a control token when they read the templates.
CONTROL_LIKE = re.compile(
    r"<[|｜][^<>{}'\" ]+?[|｜]>|</?s>|<\|?(?:turn|tool_call|tool_response|channel)\|?>|<seed:[a-z]+>|\[/?[A-Z_]+\]"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
FOLDER = SHARED / "chat_templates"


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """The real templates by file name without ending; skips the test where this machine has none."""
    if not FOLDER.is_dir():
        pytest.skip("the real chat templates are absent: they are not part of the project")
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}


def probe(name: str) -> dict[str, Any]:
    """What index.json says of a template, measured with transformers alone."""
    (found,) = [entry for entry in json.loads((FOLDER / "index.json").read_bytes()) if entry["file"] == f"{name}.jinja"]
    return dict(found["probe"])


def template(source: str, **args: Any) -> Template:
    return Template(source, SPECIAL, place="real.jinja", args=args)


def write_tokenizer(folder: Path, control: list[str]) -> Tokenizer:
    """A small byte-level tokenizer with these control tokens, saved so that transformers can load it too."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(list(dict.fromkeys(control))).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def write_sentencepiece(folder: Path, control: list[str]) -> Tokenizer:
    """A tokenizer as Llama 2, Mistral and Phi-3 have it: pieces of characters and single bytes, and a space put before
    each text between control tokens."""
    names = list(dict.fromkeys(["<unk>", *control]))
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=len(pieces) + 150, special_tokens=pieces, show_progress=False)
    backend.train_from_iterator(LINES * 4, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in names]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return load_tokenizer(folder)


def control_tokens() -> list[str]:
    """Every control token that the real templates write, and our own."""
    return [*CONTROL, *sorted(set(CONTROL_LIKE.findall("".join(sources().values()))))]


def said(role: str, content: str, **fields: Any) -> Message:
    return Message(role, content, fields)


def call(who: str, number: int = 1) -> dict[str, Any]:
    function = {"name": "look_up", "arguments": {"who": who}}
    return {"type": "function", "id": f"abcdefgh{number}", "function": function}


def result(text: str, number: int = 1) -> Message:
    return said("tool", text, name="look_up", tool_call_id=f"abcdefgh{number}")


PARAMETERS = {"type": "object", "properties": {"who": {"type": "string", "description": "name"}}, "required": ["who"]}
TOOLS = ({"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": PARAMETERS}},)
CONVERSATIONS = {
    "two turns": Conversation(
        (said("user", "Q-one?"), said("assistant", "A-one."), said("user", "Q-two?"), said("assistant", "A-two.")), "a:1"
    ),
    "edges": Conversation(
        (said("system", "Be kind. [x]"), said("user", " [[1, 2]]\n"), said("assistant", "\n [[1,2],[3,4]] "),
         said("user", "\n\nGröße {x} 👋🏽 "), said("assistant", '[{"ä": 1}]\n\n')), "a:1",
    ),
    "reasoning": Conversation(
        (said("user", "Q-one?"), said("assistant", "A-one.", reasoning_content="R-one"), said("user", "Q-two?"),
         said("assistant", "A-two.", reasoning_content="R-two")), "a:1",
    ),
    "inline": Conversation(
        (said("user", "Q-one?"), said("assistant", "<think>\nR-one\n</think>\n\nA-one."), said("user", "Q-two?"),
         said("assistant", "<think>\nR-two\n</think>\n\nA-two.")), "a:1",
    ),
    "tools": Conversation(
        (said("user", "Who?"), said("assistant", "", tool_calls=[call("Ada")]), result("Ada L."),
         said("assistant", "It is Ada."), said("user", "Thanks!"), said("assistant", "Welcome.")), "a:1", TOOLS,
    ),
    "two calls": Conversation(
        (said("user", "Who?"), said("assistant", "I look.", tool_calls=[call("Ada"), call("Bob", 2)]),
         result("Ada L."), result("Bob M.", 2), said("assistant", "It is Ada.")), "a:1", TOOLS,
    ),
    "ten turns": Conversation(
        tuple(m for i in range(10) for m in (said("user", f"Q-{i}?"), said("assistant", f"A-{i}. [{i}]"))), "a:1"
    ),
}  # fmt: skip
