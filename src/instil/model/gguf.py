"""GGUF file in, Hugging Face folder out: exact fp32 weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from instil.errors import MachineError, ModelError
from instil.model.ggufheader import refuse_overlap, walk_header
from instil.model.pieces import Unfit, pieces_tokenizer

CONVERTER_VERSION = "1"  # part of the cache key: raise it whenever the written files change

# llama.cpp's token types (llama.h, enum llama_token_type).
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# Which splitter a `tokenizer.ggml.pre` stands for; the groups are those of llama.cpp's src/llama-vocab.cpp.
_SPLITTERS = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "llama-bpe": "llama3",
    "qwen2": "qwen2",
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


@dataclass(frozen=True, slots=True)
class Source:
    """What a GGUF file holds: metadata values by key, and tensors by name as gguf's reader gives them."""

    path: Path
    values: Mapping[str, Any]
    tensors: Mapping[str, Any]

    def refuse(self, what: str, remedy: str = "use the model's original safetensors folder instead") -> NoReturn:
        """Raise the ModelError that names this file."""
        raise ModelError.at(self.path, what, remedy, rule="gguf")

    def integer(self, key: str, default: int | None = None) -> int:
        """The value of `key`, which must be a positive whole number below 2**31."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            self.refuse(f"{key} is {_short(value)}, not a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The value of `key`, a finite number > 0, as the shortest decimal of its fp32 (1e-05, not 9.9999997e-06)."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            self.refuse(f"{key} is {_short(value)}, not a positive number")
        return float(str(np.float32(value)))

    def texts(self, key: str) -> list[str]:
        """The value of `key`, which must be a list of texts."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            self.refuse(f"{key} is {_short(value)}, not a list of texts")
        return value

    def token_id(self, role: str) -> int | None:
        """The id of the token with this role ("bos", "eos", ...), or None where the file names none."""
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.texts(_TOKENS)):
            self.refuse(f"{key} is {_short(value)}, which is not a token of its vocabulary")
        return value


_TOKENS = "tokenizer.ggml.tokens"


def convert(gguf_file: Path, out: Path) -> None:
    """Write `gguf_file` as a Hugging Face folder into the folder `out`, which is made if it is not there.

    Weights are dequantised to fp32 without loss. Raises ModelError for a file that is damaged or holds what this
    converter does not know, MachineError where the folder cannot be written. `out` may then be half-written.
    """
    source = read(gguf_file)
    config = _config(source)
    tokenizer = build_tokenizer(source)
    _write(source, config, tokenizer, out, _weights(source, config))


def convert_vocabulary(gguf_file: Path, out: Path) -> None:
    """`convert` without weights: tokenizer and template, and the configuration where `convert` could write it.

    For files that hold a vocabulary only, for architectures that are not converted, and where no weights are needed.
    """
    source = read(gguf_file)
    whole = source.values.get("general.architecture") == "llama" and "token_embd.weight" in source.tensors
    _write(source, _config(source) if whole else None, build_tokenizer(source), out, None)


def _write(
    source: Source,
    config: Mapping[str, Any] | None,
    tokenizer: Tokenizer,
    out: Path,
    weights: dict[str, NDArray[np.float32]] | None,
) -> None:
    """Write the folder, of what there is."""
    tokenizer_config = _tokenizer_config(source, config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if config is not None:
            _write_json(out / "config.json", config)
        _write_json(out / "generation_config.json", _generation_config(source))
        _write_json(out / "tokenizer_config.json", tokenizer_config)
        (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        template = source.values.get("tokenizer.chat_template")
        if isinstance(template, str) and template:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
        if weights is not None:
            _write_weights(out / "model.safetensors", weights)
    except OSError as error:
        raise MachineError.at(
            out, f"cannot be written ({error.strerror or error})", "free space or choose another folder"
        ) from error


def read(gguf_file: Path) -> Source:
    """The metadata and (still quantised, memory-mapped) tensors of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError.at(
            gguf_file, "reading GGUF needs the gguf package", "pip install 'instil[gguf]'", rule="gguf"
        ) from error
    try:
        walk_header(gguf_file)
        reader = GGUFReader(gguf_file)
        refuse_overlap(reader.tensors, gguf_file.stat().st_size)
        values = {key: field.contents() for key, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except FileNotFoundError as error:
        raise ModelError.at(gguf_file, "no such file", "check the path", rule="gguf") from error
    except PermissionError as error:
        raise MachineError.at(gguf_file, "cannot be read (permission denied)", "check its permissions") from error
    except Exception as error:  # gguf has no error type of its own: a damaged file surfaces as whatever numpy raises
        detail = f"{type(error).__name__}: {_short(str(error))}"
        raise ModelError.at(
            gguf_file,
            f"not a readable GGUF file ({detail})",
            "download it again; it is damaged or cut off",
            rule="gguf",
        ) from error
    return Source(gguf_file, values, tensors)


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────


def _config(source: Source) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM, every size from the metadata."""
    arch = source.values.get("general.architecture")
    if arch != "llama":
        source.refuse(f"architecture {_short(arch)} is not one instil converts (it converts: llama)")
    scaling = source.values.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in source.tensors:
        kind = "rope_freqs (Llama 3.1)" if scaling == "none" else _short(scaling)
        source.refuse(f"rope scaling {kind} is not one instil converts")
    hidden = source.integer("llama.embedding_length")
    heads = source.integer("llama.attention.head_count")
    head_dim = source.integer("llama.attention.key_length", hidden // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if source.integer(key, head_dim) != head_dim:
            source.refuse(f"{key} is {source.values[key]}, not the head size {head_dim}")
    kv_heads = source.integer("llama.attention.head_count_kv", heads)
    if head_dim % 2 or heads % kv_heads:
        source.refuse(f"{heads} heads of size {head_dim} with {kv_heads} key heads is not a Llama shape")
    if "token_embd.weight" not in source.tensors:
        source.refuse("no tensor token_embd.weight: it holds a vocabulary, not a model")
    theta = source.number("llama.rope.freq_base", 10000.0)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(source.tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": source.integer("llama.feed_forward_length"),
        "num_hidden_layers": source.integer("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": source.integer("llama.context_length"),
        "rms_norm_eps": source.number("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "bos_token_id": source.token_id("bos"),
        "eos_token_id": source.token_id("eos"),
        "pad_token_id": source.token_id("padding"),
        "dtype": "float32",
    }


def _generation_config(source: Source) -> dict[str, Any]:
    """generation_config.json: every token that ends generation (eos, end of turn, end of message), each once."""
    ends = [source.token_id(role) for role in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    values = {
        "bos_token_id": source.token_id("bos"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": source.token_id("padding"),
    }
    return {key: value for key, value in values.items() if value is not None}


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layout(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF tensor name -> (Hugging Face name, shape), for all the tensors the model must have and no other."""
    vocab, hidden, inner = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    block = {
        "attn_norm": ("input_layernorm", (hidden,)),
        "attn_q": ("self_attn.q_proj", (queries, hidden)),
        "attn_k": ("self_attn.k_proj", (keys, hidden)),
        "attn_v": ("self_attn.v_proj", (keys, hidden)),
        "attn_output": ("self_attn.o_proj", (hidden, queries)),
        "ffn_norm": ("post_attention_layernorm", (hidden,)),
        "ffn_gate": ("mlp.gate_proj", (inner, hidden)),
        "ffn_up": ("mlp.up_proj", (inner, hidden)),
        "ffn_down": ("mlp.down_proj", (hidden, inner)),
    }
    layout = {
        "token_embd.weight": ("model.embed_tokens.weight", (vocab, hidden)),
        "output_norm.weight": ("model.norm.weight", (hidden,)),
    }
    if not config["tie_word_embeddings"]:
        layout["output.weight"] = ("lm_head.weight", (vocab, hidden))
    for n in range(config["num_hidden_layers"]):
        for theirs, (ours, shape) in block.items():
            layout[f"blk.{n}.{theirs}.weight"] = (f"model.layers.{n}.{ours}.weight", shape)
    return layout


def _weights(source: Source, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """All weights in fp32 under their Hugging Face names."""
    if config["num_hidden_layers"] > len(source.tensors):
        source.refuse(f"llama.block_count is {config['num_hidden_layers']}, but it has {len(source.tensors)} tensors")
    layout = _layout(config)
    for name in source.tensors:
        if name not in layout:
            source.refuse(f"tensor {_short(name)} has no place in a Llama model")
    weights = {}
    for theirs, (ours, shape) in layout.items():
        if theirs not in source.tensors:
            source.refuse(f"tensor {theirs} is missing")
        weight = _dequantise(source, theirs, shape)
        if theirs.endswith(".attn_q.weight"):
            weight = unpermute(weight, config["num_attention_heads"])
        elif theirs.endswith(".attn_k.weight"):
            weight = unpermute(weight, config["num_key_value_heads"])
        weights[ours] = np.ascontiguousarray(weight)
    return weights


def _dequantise(source: Source, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One tensor in fp32, of the shape it must have."""
    from gguf import quants

    tensor = source.tensors[name]
    found = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest dimension first
    if found != shape:
        source.refuse(f"tensor {name} has shape {found}, but its metadata asks for {shape}")
    try:
        weight = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
    except NotImplementedError:
        source.refuse(f"tensor {name} is stored as {tensor.tensor_type.name}, which the gguf package cannot dequantise")
    except ValueError as error:
        source.refuse(f"tensor {name} cannot be dequantised ({_short(str(error))})")
    if not np.isfinite(weight).all():
        source.refuse(f"tensor {name} holds values that are not finite", "download it again; it is damaged")
    return weight


def unpermute(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection from GGUF's order back to Hugging Face's.

    GGUF interleaves the two halves of every head (rows 0, d/2, 1, d/2+1, ...) because llama.cpp rotates neighbouring
    pairs; Hugging Face rotates row i with row i + d/2. Source: llama.cpp convert_hf_to_gguf.py, LlamaModel.permute.
    """
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_weights(path: Path, weights: dict[str, NDArray[np.float32]]) -> None:
    try:
        save_file(weights, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its only error here is a failed write
        raise OSError(str(error)) from error
    shutil.copymode(path.with_name("config.json"), path)  # save_file leaves 0600, whatever the umask says


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_tokenizer(source: Source) -> Tokenizer:
    """The file's vocabulary as a tokenizer of the tokenizers library: byte-level BPE (gpt2) or pieces (llama)."""
    model = source.values.get("tokenizer.ggml.model")
    if model == "llama":
        return _pieces(source)
    if model == "gpt2":
        return _byte_level(source)
    known = "it converts: gpt2, llama"
    source.refuse(f"tokenizer.ggml.model {_short(model)} is not one instil converts ({known})")


def _pieces(source: Source) -> Tokenizer:
    """A sentencepiece BPE vocabulary. What llama.cpp does not do to the text, such as NFKC, is not done here either."""
    for key in ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"):
        if source.values.get(key):
            source.refuse(f"{key}: this normaliser is not one instil converts")
    tokens, types = source.texts(_TOKENS), _types(source)
    scores = source.values.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or not all(isinstance(score, int | float) for score in scores):
        source.refuse(f"tokenizer.ggml.scores is {_short(scores)}, not a list of numbers")
    unknown = source.token_id("unknown")
    prefix = source.values.get("tokenizer.ggml.add_space_prefix", True)
    try:
        tokenizer = pieces_tokenizer(
            tokens, scores, types, unknown=None if unknown is None else tokens[unknown], space_prefix=bool(prefix)
        )
    except Unfit as error:
        source.refuse(str(error))
    template = _bos_template(source, tokens)
    if template is not None:
        tokenizer.post_processor = template
    _add_tokens(source, tokenizer, tokens)
    return tokenizer


def _byte_level(source: Source) -> Tokenizer:
    pre = source.values.get("tokenizer.ggml.pre")
    if pre not in _SPLITTERS:
        known = ", ".join(_SPLITTERS)
        source.refuse(f"tokenizer.ggml.pre {_short(pre)} is not one instil knows (it knows: {known})")
    tokens, splitter = source.texts(_TOKENS), _SPLITTERS[pre]
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        source.refuse("its vocabulary holds a token twice")
    halves = [merge.partition(" ") for merge in source.texts("tokenizer.ggml.merges")]
    merges = [(left, right) for left, _, right in halves]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=splitter == "llama3"))
    except Exception as error:  # tokenizers raises bare Exception for a merge outside the vocabulary
        source.refuse(f"its merges do not fit its vocabulary ({_short(str(error))})")
    if splitter == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(splitter)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(source, tokens)
    _add_tokens(source, tokenizer, tokens)
    return tokenizer


def _pre_tokenizer(splitter: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if splitter == "gpt2":
        return gpt2
    if splitter == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    regex = Regex(_LLAMA3 if splitter == "llama3" else _QWEN2)
    split = pre_tokenizers.Split(regex, behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _adds_bos(source: Source) -> bool:
    """Whether a text begins with the bos token; where the file does not say, llama.cpp's default for its splitter."""
    splitter = _SPLITTERS.get(str(source.values.get("tokenizer.ggml.pre")))
    default = splitter == "llama3" or source.values.get("tokenizer.ggml.model") == "llama"
    return bool(source.values.get("tokenizer.ggml.add_bos_token", default))


def _post_processor(source: Source, tokens: Sequence[str]) -> processors.PostProcessor:
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = _bos_template(source, tokens)
    return byte_level if template is None else processors.Sequence([byte_level, template])


def _bos_template(source: Source, tokens: Sequence[str]) -> processors.PostProcessor | None:
    """What puts the bos token first, where the vocabulary wants that."""
    bos = source.token_id("bos")
    if not _adds_bos(source) or bos is None:
        return None
    return processors.TemplateProcessing(  # "bos" is a label here: the token's own text could be taken for syntax
        single=["bos:0", "$A:0"],
        pair=["bos:0", "$A:0", "bos:1", "$B:1"],
        special_tokens=[{"id": "bos", "ids": [bos], "tokens": [tokens[bos]]}],
    )


def _add_tokens(source: Source, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Control (and unknown) tokens become special added tokens, user-defined ones plain added tokens."""
    rstrip = _takes_spaces(source)
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False, rstrip=rstrip(token))
        for token, kind in zip(tokens, _types(source), strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens(added)


def _types(source: Source) -> list[int]:
    """llama.cpp's type of each token."""
    count = len(source.texts(_TOKENS))
    types = source.values.get("tokenizer.ggml.token_type", [1] * count)
    if not isinstance(types, list) or len(types) != count:
        source.refuse("tokenizer.ggml.token_type does not give one type for each token")
    return types


def _takes_spaces(source: Source) -> Callable[[str], bool]:
    """Which added tokens take the spaces after them: Phi-3's do, which llama.cpp knows by the model's name too."""
    name = str(source.values.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return lambda token: False
    return lambda token: token not in ("<unk>", "<s>", "<|endoftext|>")


def _tokenizer_config(source: Source, config: Mapping[str, Any] | None) -> dict[str, Any]:
    tokens = source.texts(_TOKENS)
    if config is not None and len(tokens) > config["vocab_size"]:
        source.refuse(f"it has {len(tokens)} tokens, but embeddings for {config['vocab_size']}")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: source.token_id(role) for name, role in roles.items()}
    context = f"{source.values.get('general.architecture')}.context_length"
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[n] for name, n in ids.items() if n is not None},
        "add_bos_token": _adds_bos(source),
        "clean_up_tokenization_spaces": False,
        **({"model_max_length": source.integer(context)} if context in source.values else {}),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(value: object) -> str:
    """A value from the file, fit for one line of an error."""
    text = repr(value) if not isinstance(value, str) else value
    text = text.encode("ascii", "backslashreplace").decode()
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."
