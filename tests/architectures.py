"""Tiny random models of many architectures, made from transformers' own configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97
WINDOW = 6
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "attn_pdrop": 0.0,
    "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, one head of keys": ("llama", {"num_key_value_heads": 1}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, some layers windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "Gemma": ("gemma", {"head_dim": 8}),
    "Gemma 2, window and soft caps": (
        "gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0, **ALTERNATING},
    ),
    "Gemma 3, window": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, **ALTERNATING}),
    "Phi-3, window": ("phi3", {"sliding_window": WINDOW}),
    "OLMo-2": ("olmo2", {}),
    "OLMo-3, window": ("olmo3", ALTERNATING),
    "Granite": ("granite", {"attention_multiplier": 0.2, "embedding_multiplier": 2.0, "logits_scaling": 4.0}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2, window": ("cohere2", {"head_dim": 8, "logit_scale": 0.25, **ALTERNATING}),
    "SmolLM3, a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
    "GPT-NeoX, partial rotation": ("gpt_neox", {"rotary_pct": 0.5}),
    "StableLM": ("stablelm", {"partial_rotary_factor": 0.5}),
    "StarCoder 2, window": ("starcoder2", {"sliding_window": WINDOW}),
    "GPT-2, learned positions": ("gpt2", GPT2),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 8, "moe_intermediate_size": 16, **EXPERTS}),
    "gpt-oss, window and sinks": ("gpt_oss", {"head_dim": 8, "rope_parameters": YARN, **EXPERTS, **ALTERNATING}),
    "DeepSeek-V3, compressed keys": (
        "deepseek_v3",
        {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
         "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
         "first_k_dense_replace": 1, "moe_intermediate_size": 16},
    ),
    "Phi-3.5-MoE, window": ("phimoe", {"sliding_window": WINDOW, **EXPERTS}),
    "Qwen2-MoE, some layers windowed": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "moe_intermediate_size": 16,
         "shared_expert_intermediate_size": 16, **EXPERTS},
    ),
}  # fmt: skip


def architecture(
    name: str, *, dtype: torch.dtype = torch.float32, attention: str = "instil_loop", **changes: Any
) -> Any:
    """A model in evaluation mode, of which every parameter is random, so that none can be ignored unnoticed."""
    import instil.model.attention  # noqa: F401, registers the backends

    kind, fields = ARCHITECTURES[name]
    given = ({} if kind == "gpt2" else DECODER) | fields | changes
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), attn_implementation="eager")
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.15 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    net.to(dtype).eval()
    net.set_attn_implementation(attention)
    return net
