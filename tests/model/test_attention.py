"""What a model asks of its attention is handed to the right kernel, and what no kernel does exactly is refused in words."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from instil.errors import ModelError
from instil.model.attention import (
    BACKENDS,
    Layout,
    Rule,
    _through_interface,
    attention,
    best,
    dense,
    kernel_for,
    layout_of,
)
from instil.model.kernels import FlashCPU, Matmul, Varlen
from instil.model.layout import KeysAndValues
from instil.model.load import hidden_states
from instil.pack.tree import build_pack
from tries import pack_of_paths

CPU = torch.device("cpu")
DOCUMENTS = layout_of(pack_of_paths([[1, 2], [3, 4, 5, 6, 7]]), CPU)
TREE = layout_of(pack_of_paths([[1, 2, 3], [1, 2, 4, 5, 6, 7]]), CPU)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backend", [best, dense])
@pytest.mark.parametrize("layout", [DOCUMENTS, TREE], ids=["documents", "tree"])
@pytest.mark.parametrize(
    "rule", [Rule(0.4), Rule(0.4, window=2), Rule(0.4, cap=0.5), Rule(0.4, sinks=torch.tensor([0.1, -1.0, 2.0, 0.5]))]
)
def test_attention_is_the_textbooks(backend: Any, groups: int, layout: Layout, rule: Rule) -> None:
    """Written out query by query in float64: softmax over the keys that it sees (and a sink), times their values."""
    torch.manual_seed(2)
    n, heads = 7, 4
    reach, positions = layout.reach.numpy(), layout.positions.numpy()
    q, k, v = torch.randn(1, heads, n, 8), *(torch.randn(1, heads // groups, n, 8) for _ in range(2))
    found = backend(q, k, v, layout, rule)
    assert found.shape == (1, heads, n, 8)
    for head in range(heads):
        keys, values = k[0, head // groups].double().numpy(), v[0, head // groups].double().numpy()
        for i in range(n):
            seen = [j for j in range(n) if j <= i < reach[j] and positions[i] - positions[j] < (rule.window or n)]
            logits = np.array([0.4 * q[0, head, i].double().numpy() @ keys[j] for j in seen])
            if rule.cap:
                logits = rule.cap * np.tanh(logits / rule.cap)
            sink = 0.0 if rule.sinks is None else np.exp(float(rule.sinks[head]))
            expected = np.exp(logits) @ values[seen] / (np.exp(logits).sum() + sink)
            np.testing.assert_allclose(found[0, head, i].numpy(), expected, rtol=1e-5, atol=1e-6)


# --- which kernel


def tensor(device: str, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 7, width))


@pytest.mark.parametrize(
    ("query", "layout", "rule", "expected"),
    [
        (tensor("cpu"), TREE, Rule(1.0, window=2), FlashCPU()),
        (tensor("cpu", torch.float64), TREE, Rule(1.0), FlashCPU()),
        (tensor("cpu"), TREE, Rule(1.0, cap=2.0), Matmul(2.0)),
        (tensor("mps"), TREE, Rule(1.0), Matmul()),
        (tensor("cuda:0"), TREE, Rule(1.0), Varlen()),
        (tensor("cuda:0", width=256), TREE, Rule(1.0, window=6), Varlen()),  # cuts nothing
        (tensor("cuda:0"), DOCUMENTS, Rule(1.0, window=2), Varlen()),
        (tensor("cuda:0"), TREE, Rule(1.0, window=2), None),
        (tensor("cuda:0"), TREE, Rule(1.0, cap=2.0), None),
        (tensor("cuda:0", torch.float32), DOCUMENTS, Rule(1.0), None),
        (tensor("cuda:0", width=288), DOCUMENTS, Rule(1.0), None),
    ],
)
def test_each_device_and_rule_has_its_kernel(
    query: Any, layout: Layout, rule: Rule, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is FlexAttention."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernel_for(query, query, layout, rule) == expected


def test_flash_attention_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Ampere there is none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernel_for(tensor("cuda:0"), tensor("cuda:0"), DOCUMENTS, Rule(1.0)) is None


# --- through transformers' interface


def call(
    backend: Any = best, *, module: nn.Module | None = None, mask: Any = None, keys: int = 7, **options: Any
) -> Any:
    """As a model with documents of 2 and 5 tokens would call its attention."""
    q, k = torch.randn(1, 4, 7, 8), torch.randn(1, 2, keys, 8)
    given = {"instil_layout": DOCUMENTS, "scaling": 0.5} | options
    return _through_interface(backend)(module or nn.Identity(), q, k, k, mask, **given)


def refusal(**options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(**options)
    (line,) = caught.value.lines()
    assert line.startswith("Identity: ")
    return line


def rule_of(**options: Any) -> Rule:
    """The rule that a backend is given."""
    seen: list[Rule] = []

    def watching(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
        seen.append(rule)
        return best(query, key, value, layout, rule)

    call(watching, **options)
    return seen[0]


def test_the_interface_gives_tokens_before_heads() -> None:
    """[1, n, H, D], as transformers wants it, and no attention weights."""
    out, attention_weights = call()
    assert out.shape == (1, 7, 4, 8)
    assert attention_weights is None


def test_the_interface_hands_the_models_wishes_on() -> None:
    """Without a scale from the model it is 1 / sqrt(D); the reference is torch's default."""
    sinks = torch.zeros(4)
    assert rule_of(scaling=0.125) == Rule(0.125)
    assert rule_of(scaling=None) == Rule(8**-0.5)
    assert rule_of(sliding_window=4, softcap=50.0) == Rule(0.5, window=4, cap=50.0)
    assert rule_of(s_aux=sinks).sinks is sinks


def test_a_window_kept_in_the_module_counts_where_none_is_handed_over() -> None:
    """Some models hand it over, None for layers without; others keep it in the layer."""
    module = nn.Identity()
    module.sliding_window = 4  # type: ignore[assignment]
    assert rule_of(module=module).window == 4
    assert rule_of(module=module, sliding_window=None).window is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"dropout": 0.1}, "attention dropout"),
        ({"position_bias": torch.zeros(1)}, "position biases"),
        ({"indices": torch.zeros(1)}, "selected tokens"),
        ({"block_indices": torch.zeros(1)}, "selected blocks"),
        ({"mask": torch.zeros(1, 1, 7, 7)}, "an attention mask of its own"),
        ({"keys": 9}, "other tokens than those of the pack"),
        ({"is_causal": False}, "look at later ones"),
        ({"instil_layout": None}, "does not hand the pack's layout"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(options: dict[str, Any], what: str) -> None:
    """Each by its name."""
    assert what in refusal(**options)


def test_a_module_that_looks_both_ways_is_refused() -> None:
    """Where it says so itself."""
    module = nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    assert "look at later ones" in refusal(module=module)


def test_a_window_shorter_than_a_document_is_cut(tiny: Any, some_examples: Any) -> None:
    """Mistral with a window of 8: a document of 8 equals full attention, of one of 9 the last token does not."""
    net, unlimited = tiny("mistral", sliding_window=8), tiny("mistral", sliding_window=None)
    fits = build_pack(some_examples(lengths=[(4, 5), (6, 3)]), [0, 1])
    torch.testing.assert_close(hidden_states(net, fits), hidden_states(unlimited, fits), rtol=0, atol=0)
    longer = build_pack(some_examples(lengths=[(7, 3)]), [0])
    cut, whole = hidden_states(net, longer).detach(), hidden_states(unlimited, longer).detach()
    torch.testing.assert_close(cut[:8], whole[:8], rtol=1e-5, atol=1e-5)
    assert float((cut[8] - whole[8]).norm()) > 1e-3


def test_a_model_in_training_with_attention_dropout_is_refused(tiny: Any, some_examples: Any) -> None:
    """Its losses could not be those of the examples alone."""
    net = tiny(attention_dropout=0.1).train()
    with pytest.raises(ModelError, match="attention dropout"):
        hidden_states(net, build_pack(some_examples(2), [0, 1]))


def test_a_layer_that_is_used_twice_has_no_trunk(tiny: Any, some_examples: Any) -> None:
    """Two layers with one attention module would leave one pair of keys and values for both: refused where a trunk is
    computed once, and only there."""
    net = tiny()
    net.model.layers[1].self_attn = net.model.layers[0].self_attn
    pack = build_pack(some_examples(1), [0])
    layout = layout_of(pack, torch.device("cpu"))
    hidden_states(net, pack, layout)
    with pytest.raises(ModelError, match="LlamaAttention: is used twice in one pass"):
        hidden_states(net, pack, replace(layout, keep=KeysAndValues()))


def test_a_pack_that_is_no_tree_is_refused(tiny: Any, some_examples: Any) -> None:
    """A whole model meets the refusal of the layout."""
    pack = build_pack(some_examples(2), [0, 1])
    with pytest.raises(ValueError, match="not a tree"):
        hidden_states(tiny(), replace(pack, reach=np.full_like(pack.reach, len(pack.tokens) + 1)))


def test_every_backend_is_registered_under_its_name() -> None:
    """transformers finds each as instil_<name>."""
    assert {"loop", "dense"} <= set(BACKENDS)
    for name in BACKENDS:
        assert f"instil_{name}" in AttentionInterface().valid_keys()


def test_another_attention_lasts_only_for_a_while(tiny: Any) -> None:
    """Also when the block fails."""
    net = tiny()
    with attention(net, "sdpa"):
        assert net.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError), attention(net, "eager"):
        raise RuntimeError
    assert net.config._attn_implementation == "instil_loop"


def test_a_model_that_torchs_attention_cannot_serve_gets_its_own(tiny: Any) -> None:
    """torch's would leave out the soft cap of Gemma 2."""
    net = tiny("gemma2")
    with attention(net, "sdpa"):
        assert net.config._attn_implementation == "eager"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_compiled_layers_leave_attention_alone(tiny: Any, some_examples: Any) -> None:
    """A compiled layer gives the same, forward and backward, and no graph holds a part of attention."""
    net = tiny()
    packs = [build_pack(some_examples(lengths=sizes), range(2)) for sizes in ([(3, 4), (5, 2)], [(6, 1), (2, 3)])]

    def results(pack: Any) -> list[torch.Tensor]:
        hidden = hidden_states(net, pack)
        return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), list(net.model.layers.parameters()))]

    expected = [results(pack) for pack in packs]
    names: set[str] = set()

    def record(graph: Any, inputs: Any) -> Any:
        names.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    for layer in net.model.layers:
        layer.compile(backend=record, dynamic=True)
    for pack, before in zip(packs, expected, strict=True):
        torch.testing.assert_close(results(pack), before)
    assert any("silu" in name for name in names)
    assert not any("flash" in name or "softmax" in name or "logsumexp" in name for name in names)
    torch.compiler.reset()
