"""Tiny random models, random examples and the textbook's loss, for every test that runs a model."""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instil.types import Example, Pack

VOCABULARY = 97
ROPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "bos_token_id": 1,
    "eos_token_id": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 1,
    "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", ROPE | {"tie_word_embeddings": False}),
    "llama-tied": ("llama", ROPE | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", ROPE | {"tie_word_embeddings": False}),  # biases on q, k, v
    "qwen3": ("qwen3", ROPE | {"tie_word_embeddings": True, "head_dim": 8}),  # norms on q and k
    "mistral": ("mistral", ROPE | {"tie_word_embeddings": False, "sliding_window": 8}),
    "granite": ("granite", ROPE | {"logits_scaling": 4.0}),
    "cohere": ("cohere", ROPE | {"logit_scale": 0.25, "pad_token_id": 0}),
    "gemma2": ("gemma2", ROPE | {"head_dim": 8, "pad_token_id": 0}),
    "gpt2": ("gpt2", GPT2),  # learned positions, tied
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
}


@pytest.fixture(scope="session", autouse=True)
def _listening() -> None:
    """A shell starts what is in the background with Ctrl-C ignored, and Python leaves it so: here it counts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same random numbers and deterministic kernels, wherever torch is in use.

    One thread: on a busy machine two threads wait for each other at every tiny matrix (measured: 72 s instead of 9 s).
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Make a small random model of a kind; every parameter is random, so that none can be ignored unnoticed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str = "llama", *, attention: str = "instil_loop", seed: int = 0, **changes: Any) -> Any:
        import instil.model.attention  # noqa: F401, registers the backends

        name, fields = KINDS[kind]
        torch.manual_seed(seed)
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields | changes))
        with torch.no_grad():
            for parameter in net.parameters():
                noise = torch.randn_like(parameter)
                parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        net.eval()
        net.set_attn_implementation(attention)
        return net

    return make


@pytest.fixture(scope="session")
def saved(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny model to a folder, as somebody else would have."""

    def write(kind: str = "llama", **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        tiny(kind, attention="eager", **changes).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    """An example from lists; weights are 1 unless given."""

    def make(
        prompt: Sequence[int], answer: Sequence[int], weights: Sequence[float] | None = None, **more: Any
    ) -> Example:
        counted = np.ones(len(answer)) if weights is None else np.asarray(weights)
        return Example(
            np.asarray(prompt, np.int32),
            np.asarray(answer, np.int32),
            counted.astype(np.float32),
            more.get("origin", "x.jsonl:1"),
            more.get("turn", 0),
        )

    return make


@pytest.fixture(scope="session")
def some_examples(make_example: Callable[..., Example]) -> Callable[..., list[Example]]:
    """n examples with random tokens; lengths [(prompt, answer)] are random too unless given; weighted: not all 1."""

    def make(
        n: int = 4, *, lengths: Sequence[tuple[int, int]] = (), seed: int = 0, weighted: bool = False
    ) -> list[Example]:
        rng = np.random.default_rng(seed)
        sizes = list(lengths) or [(int(p), int(a)) for p, a in rng.integers([1, 1], [12, 9], (n, 2))]
        return [
            make_example(
                rng.integers(0, VOCABULARY, p),
                rng.integers(0, VOCABULARY, a),
                rng.choice([0.0, 0.5, 1.0, 2.0], a) + (np.arange(a) == a - 1) if weighted else None,
                origin=f"x.jsonl:{i + 1}",
            )
            for i, (p, a) in enumerate(sizes)
        ]

    return make


@pytest.fixture(scope="session")
def textbook() -> Callable[..., Any]:
    """The loss as books write it: transformers' model, one example at a time, its own eager attention, full logits.

    Returns sum(weight * nll) / sum(weight) and every parameter's gradient of it, by name. The model given is not touched.
    """
    import torch

    def compute(net: Any, examples: Sequence[Example]) -> tuple[float, dict[str, Any]]:
        model = copy.deepcopy(net)
        model.set_attn_implementation("eager")
        model.zero_grad(set_to_none=True)
        total = sum(float(example.weights.sum()) for example in examples)
        loss = 0.0
        for example in examples:
            p, a = len(example.prompt_tokens), len(example.answer_tokens)
            tokens = torch.tensor([[*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]])
            log_p = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
            part = sum(float(example.weights[j]) * -log_p[p - 1 + j, int(example.answer_tokens[j])] for j in range(a))
            (part / total).backward()
            loss += float(part.detach()) / total
        return loss, {n: q.grad for n, q in model.named_parameters()}

    return compute


@pytest.fixture(scope="session")
def gradients_of() -> Callable[..., Any]:
    """The loss of packs and every parameter's gradient, through instil's pack_loss; `weight_sum` = the packs' own."""
    from instil.train.loss import pack_loss

    def compute(net: Any, packs: Sequence[Pack], loss: Callable[..., Any] = pack_loss) -> tuple[float, dict[str, Any]]:
        net.zero_grad(set_to_none=True)
        weight_sum = float(sum(pack.weight.sum(dtype=np.float64) for pack in packs))
        total = 0.0
        for pack in packs:
            part = loss(net, pack, weight_sum).share
            part.backward()
            total += float(part.detach())
        found = {n: p.grad.clone() for n, p in net.named_parameters()}
        net.zero_grad(set_to_none=True)
        return total, found

    return compute


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """Two (loss, gradients) agree to `tolerance`: relative for the loss and for the norm of each gradient.

    A gradient that is zero in theory (the key bias without rotation) is rounding noise; `floor` of the whole gradient's
    norm allows for it.
    """

    def check(found: Any, expected: Any, *, tolerance: float = 1e-6, floor: float = 1e-7) -> None:
        assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0]), f"loss {found[0]} is not {expected[0]}"
        assert found[1].keys() == expected[1].keys()
        whole = sum(float(g.double().square().sum()) for g in expected[1].values()) ** 0.5
        for name, gradient in expected[1].items():
            error = float((found[1][name] - gradient).norm())
            allowed = tolerance * float(gradient.norm()) + floor * tolerance / 1e-6 * whole
            assert error <= allowed, f"gradient of {name} is off by {error / float(gradient.norm()):.2g}"

    return check


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model `m`, forty rows in `a.jsonl`, and nothing else."""
    import tiny

    tiny.write_model(tmp_path / "m")
    tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(40))
    return tmp_path
