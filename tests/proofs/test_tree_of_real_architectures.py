"""A prefix tree trains every architecture as its sequences alone do: losses, and the gradient of each parameter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from architectures import ARCHITECTURES, VOCABULARY, architecture
from instil.errors import ModelError
from instil.model.attention import Layout, Rule, _through_interface, best
from instil.model.layout import layout_of
from instil.model.load import hidden_states, probe_isolation, probe_window
from instil.types import Example
from tries import trie_pack

REFUSED = {
    "StableLM": "does not hand the pack's layout to its attention",
    "Phi-3.5-MoE, window": "differ from the model's own",  # its layers are not told of the window, which cuts the probe
}
SOUND = [name for name in ARCHITECTURES if name not in REFUSED]


@pytest.fixture
def examples(make_example: Any) -> list[Example]:
    """Two answers to one prompt, two to a longer one that begins alike, and one by itself; windows cut all but the last."""
    rng = np.random.default_rng(3)

    def some(n: int) -> list[int]:
        return rng.integers(3, VOCABULARY, n).tolist()

    prompt = some(9)
    longer = [*prompt, *some(4)]
    return [
        make_example(prompt, some(3), [1, 0.5, 2]),
        make_example(prompt, some(11)),
        make_example(longer, some(2)),
        make_example(longer, some(5), [1, 0, 1, 1, 2]),
        make_example(some(2), some(3)),
    ]


@pytest.mark.parametrize("name", SOUND)
def test_a_tree_trains_as_its_sequences_alone(
    name: str, examples: list[Example], textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """Against transformers' own eager attention on one sequence at a time, without a line of instil's.

    In float64: what is left are the norms and softmaxes that the models themselves compute in float32.
    """
    net = architecture(name, dtype=torch.float64, experts_implementation="eager")
    pack = trie_pack(examples)
    assert len(pack.tokens) == 34  # 64 alone
    assert_same(gradients_of(net, [pack]), textbook(net, examples), tolerance=1e-6)


@pytest.mark.parametrize("name", SOUND)
def test_the_probes_pass_it(name: str) -> None:
    """In float32, as they are run at load, with examples longer than its window."""
    net = architecture(name)
    probe_isolation(net, "m")
    probe_window(net, "m", 100)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_treated_so_is_refused_by_name(name: str) -> None:
    """Before training."""
    with pytest.raises(ModelError, match=REFUSED[name]):
        probe_isolation(architecture(name), "m")


def without_window(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: a window that is not cut."""
    return best(query, key, value, layout, replace(rule, window=None))


def without_cap(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: logits that are not capped."""
    return best(query, key, value, layout, replace(rule, cap=None))


def without_sinks(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: sinks that take no weight."""
    out = best(query, key, value, layout, replace(rule, sinks=None))
    return out if rule.sinks is None else out + 0 * rule.sinks.sum()


for _fault in (without_window, without_cap, without_sinks):
    AttentionInterface.register(f"instil_tree_{_fault.__name__}", _through_interface(_fault))


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("Mistral, window", "window"),
        ("Gemma 3, window", "window"),
        ("Gemma 2, window and soft caps", "window"),
        ("Gemma 2, window and soft caps", "cap"),
        ("gpt-oss, window and sinks", "window"),
        ("gpt-oss, window and sinks", "sinks"),
    ],
)
def test_what_an_architecture_asks_for_is_needed(
    name: str, fault: str, examples: list[Example], textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails where its window, cap or sinks are left out."""
    net = architecture(
        name, dtype=torch.float64, attention=f"instil_tree_without_{fault}", experts_implementation="eager"
    )
    with pytest.raises(AssertionError):
        assert_same(gradients_of(net, [trie_pack(examples)]), textbook(net, examples), tolerance=1e-3)


@pytest.mark.parametrize("name", SOUND)
def test_every_branch_of_a_tree_is_untouched_by_the_others(name: str, examples: list[Example]) -> None:
    """Other tokens in one branch leave all tokens that are not below them as they were, to the bit.

    Only where tokens share an expert's matrix product may the others' number move the last digits.
    """
    net = architecture(name, experts_implementation="eager")
    rounding = 1e-5 if any(type(m).__name__.endswith("Experts") for m in net.modules()) else 0.0
    pack = trie_pack(examples)
    with torch.no_grad():
        before = hidden_states(net, pack)
        for segment in layout_of(pack, torch.device("cpu")).segments:
            tokens = pack.tokens.copy()
            tokens[segment.start : segment.stop] = (tokens[segment.start : segment.stop] + 1) % VOCABULARY
            after = hidden_states(net, replace(pack, tokens=tokens))
            outside = torch.ones(len(tokens), dtype=torch.bool)
            outside[segment.start : segment.reach] = False
            assert float((after - before)[outside].abs().max()) <= rounding
            assert float((after - before)[~outside].abs().max()) > 1e-3
