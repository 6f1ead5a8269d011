"""Templates of our own and a small tokenizer for the chat tests."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
LINES = ["Hello world, the answer is yes.", "The quick brown fox says Hello to the world.", "[[1,2],[3,4]] is a list"]
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}

CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>{% endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% elif message.role == 'assistant' %}
 {{ message.content }}{{ eos_token }}
{%- elif message.role == 'system' %}{{ message.content }}

{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}
{% endfor %}"""
SPACED = """{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "spaced": SPACED}


def train_tokenizer(control: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer with `control` as its special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420 + len(control), initial_alphabet=alphabet, special_tokens=control, show_progress=False
    )
    backend.train_from_iterator(LINES * 4, trainer)
    return backend
