"""A folder becomes a model whose packs are isolated, or a refusal in one line that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from architectures import architecture
from instil.errors import InstilError, MachineError, ModelError
from instil.model.attention import Layout, Rule, _through_interface, best
from instil.model.head import Head
from instil.model.layout import Segment
from instil.model.load import (
    device_named,
    hidden_states,
    load_model,
    probe_isolation,
    probe_training,
    probe_window,
    refuse_lengths,
    refuse_recurrent,
)
from instil.pack.tree import build_pack

CPU, FP32 = torch.device("cpu"), torch.float32


def line_of(error: type[InstilError], do: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        do(*arguments, **options)
    (line,) = caught.value.lines()
    return line


# --- a whole model


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "granite", "cohere", "mistral"])
def test_a_folder_becomes_the_model_that_was_saved(kind: str, saved: Any, tiny: Any) -> None:
    """Every weight, in evaluation mode, with our attention, and past its probe."""
    net = load_model(saved(kind), dtype=FP32, device=CPU)
    for (name, found), (_, expected) in zip(net.named_parameters(), tiny(kind).named_parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert net.config._attn_implementation == "instil_loop"
    assert not net.training


def test_weights_come_in_the_dtype_asked_for(saved: Any) -> None:
    """bf16 for training; rotary frequencies stay float32."""
    net = load_model(saved("llama"), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in net.buffers()} == {FP32}


def broken_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "perceptron"}')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [broken_json, unknown_type, no_weights, cut_weights, other_shape])
def test_a_broken_folder_is_refused_in_one_line_that_names_it(damage: Any, saved: Any) -> None:
    """Never with a traceback of somebody else's."""
    folder = saved("llama")
    damage(folder)
    assert str(folder) in line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)


def test_pickled_weights_are_not_read(saved: Any) -> None:
    """A folder with only pytorch_model.bin does not load: a pickle can run anything."""
    folder = saved("llama")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)


def test_a_missing_weight_is_refused(saved: Any) -> None:
    """A model with a layer that was never saved would train on noise."""
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "up_proj" in line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)


def test_weights_that_config_json_leaves_out_are_refused(saved: Any) -> None:
    """With one layer in config.json and two in the file, half of the model would be trained and the other half lost."""
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    line = line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)
    assert line.startswith(f"{folder}: has weights that its config.json leaves out: model.layers.1.")
    assert "and 6 more; use the config.json" in line


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("model.layers.0.self_attn.q_proj.bias", True),  # of a layer that config.json gives no bias
        ("model.layers.1.self_attn.q_norm.weight", True),
        ("model.layers.0.mlp.up_proj.weight_scale", True),
        ("model.layers.0.self_attn.bias", False),  # a causal mask, as old models were saved with
        ("model.layers.0.self_attn.masked_bias", False),
        ("visual.blocks.0.attn.proj.weight", False),
        ("mtp.layers.0.eh_proj.weight", False),
        ("value_head.weight", False),
    ],
)
def test_other_tensors_are_refused_where_they_are_weights_of_its_layers(name: str, refused: bool, saved: Any) -> None:
    """What belongs to the layers changes what they compute; other towers and heads may stay behind."""
    folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    if refused:
        assert f"leaves out: {name}; use" in line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)
    else:
        load_model(folder, dtype=FP32, device=CPU)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_what_is_no_causal_language_model_is_refused(name: str, tmp_path: Path) -> None:
    """Encoder-decoders and models without language."""
    AutoConfig.for_model(name).save_pretrained(tmp_path)
    assert str(tmp_path) in line_of(ModelError, load_model, tmp_path, dtype=FP32, device=CPU)


def test_a_device_that_is_not_here_is_refused() -> None:
    """With the names of those that are; the CPU always is."""
    assert device_named("cpu") == CPU
    assert device_named("auto").type in ("cpu", "cuda")
    assert "cpu" in line_of(MachineError, device_named, "cuda:97")
    assert "'tpu'" in line_of(MachineError, device_named, "tpu")


# --- state outside attention


@pytest.mark.parametrize(
    "name",
    ["mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "falcon_h1", "zamba2", "recurrent_gemma", "rwkv", "xlstm",
     "lfm2", "qwen3_next", "granitemoehybrid", "nemotron_h", "minimax"],
)  # fmt: skip
def test_models_with_state_outside_attention_are_refused_by_name(name: str) -> None:
    """State spaces, convolutions and linear attention carry one document into the next."""
    line = line_of(ModelError, refuse_recurrent, AutoConfig.for_model(name), "m")
    assert name in line
    assert "outside attention" in line


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gpt2", "phi3", "olmo2", "smollm3"]
)
def test_pure_attention_models_are_not_refused(name: str) -> None:
    """By their default configuration."""
    refuse_recurrent(AutoConfig.for_model(name), "m")


# --- the probe


def leaky(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: attention over the whole pack."""
    n = query.shape[2]
    one = Segment(0, n, n, 0, 0)
    return best(query, key, value, Layout(layout.reach, layout.positions, (one,), n), rule)


def branchless(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: documents are isolated, but whatever is below a shared prefix is one run of tokens."""
    kept: list[Segment] = []
    for s in layout.segments:
        kept += [replace(s, stop=s.reach)] if s.level == 0 else []
    return best(query, key, value, Layout(layout.reach, layout.positions, tuple(kept), query.shape[2]), rule)


def unscaled(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: isolated, but not the model's own attention."""
    return best(query, key, value, layout, replace(rule, scale=3 * rule.scale))


def forgets_prefix(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: a branch does not see what it goes on from."""
    alone = tuple(replace(s, reach=s.stop) for s in layout.segments)
    return best(query, key, value, Layout(layout.reach, layout.positions, alone, layout.longest_tokens), rule)


for _fault in (leaky, branchless, unscaled, forgets_prefix):
    AttentionInterface.register(f"instil_test_{_fault.__name__}", _through_interface(_fault))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_probe_passes_a_sound_model_and_changes_nothing(kind: str, tiny: Any) -> None:
    """Its attention and weights are as before."""
    net = tiny(kind)
    before = {n: p.clone() for n, p in net.named_parameters()}
    probe_isolation(net, "m")
    assert net.config._attn_implementation == "instil_loop"
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_probe_catches_a_leak(kind: str, tiny: Any) -> None:
    """A backend that sees the whole pack is named as leaking."""
    assert "leaks between the documents" in line_of(
        ModelError, probe_isolation, tiny(kind, attention="instil_test_leaky"), "m"
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_probe_catches_a_leak_between_branches(kind: str, tiny: Any) -> None:
    """Documents are isolated there; only the branches of one see each other."""
    line = line_of(ModelError, probe_isolation, tiny(kind, attention="instil_test_branchless"), "m")
    assert "leaks between the branches of a shared prefix" in line


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_probe_catches_a_branch_without_its_prefix(kind: str, tiny: Any) -> None:
    """A model that cannot be treated as a tree is refused before training."""
    line = line_of(ModelError, probe_isolation, tiny(kind, attention="instil_test_forgets_prefix"), "m")
    assert "logits in branches of a shared prefix differ from the model's own" in line


def test_what_attention_refuses_is_said_of_the_folder(tiny: Any) -> None:
    """Attention knows no more than the class of its layer; which model it is belongs to the line."""
    net = tiny()
    net.model.layers[1].self_attn.is_causal = False
    line = line_of(ModelError, probe_isolation, net, "m")
    assert line == "m: LlamaAttention lets tokens look at later ones; use a causal language model"


def test_the_probe_catches_another_attention(tiny: Any) -> None:
    """Isolated but with another scale: the logits are not the model's own."""
    assert "differ from the model's own" in line_of(
        ModelError, probe_isolation, tiny(attention="instil_test_unscaled"), "m"
    )


@pytest.mark.parametrize("name", ["Mistral, window", "Gemma 2, window and soft caps", "Gemma 3, window"])
def test_the_probe_passes_a_window_that_attention_is_told_of(name: str) -> None:
    """And leaves it as wide as it was."""
    net = architecture(name, sliding_window=8)
    windows = [getattr(m, "sliding_window", None) for m in net.modules()]
    probe_window(net, "m", 9)
    assert net.config.sliding_window == 8
    assert [getattr(m, "sliding_window", None) for m in net.modules()] == windows


def test_the_probe_catches_a_window_that_attention_is_not_told_of() -> None:
    """Phi-3.5-MoE's model masks by its window, and its layers hand none over; shorter examples do not meet it."""
    net = architecture("Phi-3.5-MoE, window", sliding_window=8)
    probe_window(net, "m", 8)
    line = line_of(ModelError, probe_window, net, "m", 9)
    assert "does not tell its attention of its window of 8 tokens" in line
    assert "set pack.tokens to at most 8" in line
    assert net.config.sliding_window == 8


def test_the_probe_catches_a_window_that_is_off_by_one(tiny: Any) -> None:
    """What a layer hands over and what the model masks by must be the same number."""
    net = tiny("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    probe_window(net, "m", 9)
    net.model.layers[1].self_attn.sliding_window = 9
    assert "does not tell" in line_of(ModelError, probe_window, net, "m", 9)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [("llama", "logits_scaling", 2.0), ("llama", "logit_scale", 0.5), ("llama", "final_logit_softcapping", 1.0)],
)
def test_the_probe_catches_a_head_that_is_not_the_models(kind: str, field: str, value: Any, tiny: Any) -> None:
    """A factor or a cap that the configuration names and the model does not apply."""
    net = tiny(kind)
    setattr(net.config, field, value)
    assert "differ from the model's own" in line_of(ModelError, probe_isolation, net, "m")


def test_the_probe_catches_a_factor_that_we_overlook(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite divides its logits by 4; a head that does not know is refused."""
    monkeypatch.setattr("instil.model.load.head_of", lambda net: Head(net.lm_head.weight, None))
    assert "differ from the model's own" in line_of(ModelError, probe_isolation, tiny("granite"), "m")


def test_the_probe_catches_weights_that_are_not_numbers(tiny: Any) -> None:
    """A NaN weight is found before the first step."""
    net = tiny()
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    assert "differ" in line_of(ModelError, probe_isolation, net, "m")


def test_the_probe_catches_positions_that_are_not_passed_on(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that counts positions through the pack is refused."""
    net = tiny("gpt2")
    inner = net.transformer.forward
    monkeypatch.setattr(net.transformer, "forward", lambda *a, **k: inner(*a, **(k | {"position_ids": None})))
    assert "differ from the model's own" in line_of(ModelError, probe_isolation, net, "m")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_fails_in_bfloat16_is_looked_at_in_float32(kind: str, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of bfloat16, which may send a token to other experts, refuses no sound model; a fault is refused all the same.
    Afterwards the parameters are those from before."""
    monkeypatch.setattr("instil.model.load.PROBE_TOLERANCE", {FP32: 1e-3, torch.bfloat16: 1e-6})
    net = tiny(kind).bfloat16()
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters()}
    probe_isolation(net, "m")
    for name, p in net.named_parameters():
        assert p is before[name][0]
        assert p.dtype == torch.bfloat16
        assert torch.equal(p, before[name][1])
    for fault, what in (("forgets_prefix", "branches of a shared prefix differ"), ("leaky", "leaks between")):
        broken = tiny(kind, attention=f"instil_test_{fault}").bfloat16()
        assert what in line_of(ModelError, probe_isolation, broken, "m")
        assert {p.dtype for p in broken.parameters()} == {torch.bfloat16}


def test_a_window_that_fails_in_bfloat16_is_looked_at_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the isolation is."""
    monkeypatch.setattr("instil.model.load.PROBE_TOLERANCE", {FP32: 1e-3, torch.bfloat16: 1e-6})
    probe_window(architecture("Mistral, window", sliding_window=8, dtype=torch.bfloat16), "m", 9)
    untold = architecture("Phi-3.5-MoE, window", sliding_window=8, dtype=torch.bfloat16)
    assert "does not tell" in line_of(ModelError, probe_window, untold, "m", 9)


# --- what is drawn at random in training


@pytest.mark.parametrize(("kind", "key"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout")])
def test_dropout_in_attention_is_refused_by_the_models_own_key(kind: str, key: str, tiny: Any) -> None:
    """With its value and the file that it is in; the model is left as it was, and so are the random numbers."""
    net = tiny(kind, **{key: 0.25})
    state = torch.get_rng_state()
    line = line_of(ModelError, probe_training, net, Path("m"))
    assert line == f"m/config.json: {key}=0.25: dropout in attention is not exact in a pack; set {key} to 0 there"
    assert not net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_elsewhere_is_told_with_its_size(tiny: Any) -> None:
    """By the keys that say so, but not by those of other heads (GPT-2 has summary_first_dropout=0.1); nobody's random
    numbers are used up."""
    net = tiny("gpt2", resid_pdrop=0.2, embd_pdrop=0.05)
    state = torch.get_rng_state()
    (line,) = probe_training(net, Path("m"))
    assert "(resid_pdrop=0.2, embd_pdrop=0.05)" in line
    assert not net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_draws_nothing_is_told_nothing_of(tiny: Any) -> None:
    """Also where its config.json has a key for dropout that the model does not know."""
    assert probe_training(tiny("llama"), Path("m")) == []
    assert probe_training(tiny("llama", hidden_dropout=0.1), Path("m")) == []


def test_a_router_that_draws_is_told() -> None:
    """Phi-3.5-MoE's router samples while it learns, whatever its configuration says of noise."""
    (line,) = probe_training(architecture("Phi-3.5-MoE, window"), Path("m"))
    assert "draws at random while it learns" in line


def test_loading_runs_the_probe(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fails it is not handed out."""
    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling": 2.0}))
    assert str(folder) in line_of(ModelError, load_model, folder, dtype=FP32, device=CPU)
    load_model(folder, dtype=FP32, device=CPU, probe=False)
    AutoModelForCausalLM.from_pretrained(folder)


# --- lengths beyond which a pack is not its documents


def limited(**fields: Any) -> Any:
    return AutoConfig.for_model("llama", **fields)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (limited(attention_chunk_size=16), "attention chunks at 16 tokens"),
        (
            AutoConfig.for_model(
                "phi3",
                max_position_embeddings=64,
                original_max_position_embeddings=16,
                pad_token_id=0,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 16,
                    "short_factor": [1.0] * 48,
                    "long_factor": [2.0] * 48,
                },
            ),
            "longrope positions",
        ),
        (
            limited(
                max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            ),
            "dynamic positions",
        ),
    ],
    ids=["chunks", "longrope", "dynamic"],
)
def test_examples_longer_than_a_limit_of_the_model_are_refused_before_training(config: Any, what: str) -> None:
    """Chunks and frequencies that change with the longest document: refused from one token beyond."""
    refuse_lengths(config, 16, "here")
    line = line_of(ModelError, refuse_lengths, config, 17, "here")
    assert what in line
    assert "set pack.tokens to at most 16" in line


def test_a_window_is_no_limit() -> None:
    """It is cut exactly."""
    refuse_lengths(AutoConfig.for_model("mistral", sliding_window=16), 1 << 20, "here")


def test_plain_and_scaled_positions_have_no_limit() -> None:
    """llama3 and yarn scale every position alike, whatever the pack holds."""
    for kind in ("default", "llama3", "yarn"):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
        refuse_lengths(limited(max_position_embeddings=32, rope_parameters=rope), 1 << 20, "here")


def test_dynamic_positions_do_leak_between_documents(tiny: Any, make_example: Any) -> None:
    """The fault that the refusal prevents is real: a short document changes when a long one joins its pack."""
    net = tiny("llama")
    config = type(net.config)(**{**net.config.to_dict(), "max_position_embeddings": 8,
                                 "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}})  # fmt: skip
    leaky = AutoModelForCausalLM.from_config(config, attn_implementation="instil_loop").eval()
    short, long = make_example([5, 6, 7], [8, 9]), make_example(list(range(30)), list(range(10)))
    with torch.no_grad():
        alone = hidden_states(leaky, build_pack([short], [0]))
        joined = hidden_states(leaky, build_pack([short, long], [0, 1]))[: len(alone)]
    assert not torch.allclose(alone, joined, atol=1e-4)
