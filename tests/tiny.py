"""A tiny real model folder and small data files, with which a whole run takes a fraction of a second."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A template that marks the last message: what the server sends is not what the finished conversation begins with.
REWRITES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}{{ ' now' if loop.last }}\n{{ message.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "red green blue black white grey brown pink gold lime teal navy plum rose ruby jade".split()
FAST = ("train.precision=fp32", "run.threads=1")  # what almost every test wants


def write_model(folder: Path, *, weights: bool = True, template: str | None = CHATML, **config: Any) -> Path:
    """A Hugging Face folder: byte-level BPE of 300 tokens, ChatML, a random Llama of two layers, 32 wide."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if weights:
        _write_weights(folder, config)
    return folder


def _write_tokenizer(folder: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=CONTROL,
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator([f"say {word} the user assistant" for word in WORDS] * 4, trainer)
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 256}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def _write_weights(folder: Path, changes: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    fields = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    net = LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (1.0 if parameter.dim() == 1 else 0.0))
        net.lm_head.weight *= 3  # so that a frozen head can be sure of a token
    net.save_pretrained(folder)


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    """One conversation of a question and an answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def some_rows(n: int) -> list[dict[str, Any]]:
    """n different rows; the answers are short."""
    return [row(f"say {WORDS[i % 16]} {i}", WORDS[(7 * i + 3) % 16]) for i in range(n)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path | bytes) -> bool:
    """Whether a file holds the same bytes as another, or these: pytest would print two large files' differences for hours."""
    return one.read_bytes() == (other if isinstance(other, bytes) else other.read_bytes())


def without_times(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records but for what a clock wrote."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def tree(folder: Path) -> set[str]:
    """Every path below a folder, relative."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@dataclass(frozen=True)
class Said:
    """What a command line said: its exit code, stdout, and the lines of stderr."""

    code: int
    out: str
    err: list[str]


def command(*words: object, text: str | None = None) -> Said:
    """Run `instil WORDS` in this process; text: what stdin holds. An exception that is a bug fails the test."""
    from typer.testing import CliRunner

    from instil.cli.main import app

    done = CliRunner().invoke(app, [str(word) for word in words], input=text)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError("".join(traceback.format_exception(done.exception)))
    return Said(done.exit_code, done.stdout, done.stderr.splitlines())
