"""What is exported loads in transformers as it is, gives the same logits, and stops where we taught it to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from instil.files import publish
from instil.model.export import export_model
from instil.model.head import head_of
from instil.model.load import hidden_states, load_model
from instil.pack.tree import build_pack

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}ä"


@pytest.fixture
def source(saved: Any) -> Path:
    """A base model's folder with tokenizer files and something that is nobody's business."""
    folder: Path = saved("llama-tied")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "private.txt").write_text("no")
    return folder


def export(net: Any, out: Path, source: Path, ids: list[int]) -> None:
    endings = [{"text": f"<{i}>", "id": i} for i in ids]
    export_model(net, out, source=source, template=TEMPLATE, terminators=endings)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "gpt2"])
def test_an_exported_model_has_the_logits_of_the_trained_one(
    kind: str, tiny: Any, source: Path, tmp_path: Path, some_examples: Any
) -> None:
    """from_pretrained in plain transformers, with its own attention, against our head on a pack of one example."""
    net = tiny(kind, seed=5)
    export(net, tmp_path / "model", source, [7])
    pack = build_pack(some_examples(1), [0])
    with torch.no_grad():
        ours = head_of(net).logits(hidden_states(net, pack))
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        theirs = fresh(input_ids=torch.tensor(pack.tokens)[None].long()).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert fresh.config._attn_implementation == "sdpa"
    for (name, a), (_, b) in zip(net.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_exported_model_stops_at_the_terminator(tiny: Any, source: Path, tmp_path: Path) -> None:
    """The terminators come first, and the ids the model stopped at before stay."""
    net = tiny()
    assert net.config.eos_token_id == 2
    export(net, tmp_path / "model", source, [7, 9])
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [7, 9, 2]


def test_a_terminator_the_model_had_is_not_doubled(tiny: Any, source: Path, tmp_path: Path) -> None:
    """Its end-of-text is often the terminator."""
    export(tiny(), tmp_path / "model", source, [2])
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [2]


def test_an_end_that_is_no_single_token_is_a_stop_string(tiny: Any, source: Path, tmp_path: Path) -> None:
    """It cannot be an eos id; the tokens that are ids stay, and a model without such an end has no stop strings."""
    endings = [{"text": "\n###", "id": None}, {"text": "<7>", "id": 7}]
    export_model(tiny(), tmp_path / "model", source=source, template=TEMPLATE, terminators=endings)
    config = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (config.stop_strings, config.eos_token_id) == (["\n###"], [7, 2])
    export(tiny(), tmp_path / "plain", source, [7])
    assert GenerationConfig.from_pretrained(tmp_path / "plain").stop_strings is None


def test_generation_in_plain_transformers_ends_at_the_terminator(tiny: Any, source: Path, tmp_path: Path) -> None:
    """A model that always says 7 says it once."""
    net = tiny()
    with torch.no_grad():
        net.lm_head.weight.zero_()
        net.lm_head.weight[7] = 50 * net.model.norm.weight  # the states' largest logit, whichever their sign
        net.model.norm.weight.zero_()
        net.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(7), 97).float())
    export(tiny(), tmp_path / "model", source, [7])
    config = GenerationConfig.from_pretrained(tmp_path / "model")
    net.set_attn_implementation("sdpa")
    out = net.generate(torch.tensor([[5, 6]]), generation_config=config, max_new_tokens=5, do_sample=False)
    assert out[0].tolist() == [5, 6, 7]


def test_an_export_changes_nothing_of_the_model_in_training(tiny: Any, source: Path, tmp_path: Path) -> None:
    """It goes on with our attention and its own generation config."""
    net = tiny()
    before = net.generation_config
    export(net, tmp_path / "model", source, [7])
    assert net.config._attn_implementation == "instil_loop"
    assert net.generation_config is before
    assert before.eos_token_id == 2


def test_an_export_has_tokenizer_and_template_and_no_more(tiny: Any, source: Path, tmp_path: Path) -> None:
    """Copied byte by byte; weights are safetensors."""
    export(tiny(), tmp_path / "model", source, [7])
    names = {f.name for f in (tmp_path / "model").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "model" / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_an_exported_model_can_be_trained_again(tiny: Any, source: Path, tmp_path: Path) -> None:
    """It passes the probe of our own loader."""
    export(tiny(), tmp_path / "model", source, [7])
    load_model(tmp_path / "model", dtype=torch.float32, device=torch.device("cpu"))


def test_equal_models_are_exported_to_equal_bytes(tiny: Any, source: Path, tmp_path: Path) -> None:
    """model.safetensors is bit-identical for equal weights."""
    for name in ("a", "b"):
        export(tiny(), tmp_path / name, source, [7])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_folder_that_fails_to_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """Old or new, never between, and nothing beside it."""
    out = tmp_path / "model"
    publish(out, lambda folder: (folder / "a").write_text("old") and None)

    def fail(folder: Path) -> None:
        (folder / "a").write_text("new")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(out, fail)
    assert (out / "a").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_folder_written_again_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """No file of the old one is left in it."""
    out = tmp_path / "model"
    for name in ("a", "b"):
        publish(out, lambda folder, name=name: (folder / name).write_text(name) and None)
    assert [f.name for f in out.iterdir()] == ["b"]
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
