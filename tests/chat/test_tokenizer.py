"""The tokenizer is read as transformers reads it, and says what is missing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tokenizers

from instil.chat.tokenizer import eos_ids, load_tokenizer
from instil.errors import ModelError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TEXTS = ["", "Hello world", "<s><|im_start|>user\n  Grüße 👋🏽\t<|im_end|>", "a\r\nb   c", "<|unknown|> [[1,2]]"]


def test_ids_are_those_of_transformers(chatml, oracle):
    """A text has the ids that the server's tokenizer gives it, alone or in a batch."""
    ours, theirs = load_tokenizer(chatml), oracle(chatml)
    expected = [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS) == expected
    assert [ids for ids, _ in ours.encode_offsets(TEXTS)] == expected


def test_decode_gives_the_text_back(chatml):
    """Decoding writes control tokens out, or leaves them out when asked to."""
    tokenizer = load_tokenizer(chatml)
    ids = tokenizer.encode("Hello 👋🏽<|im_end|>\n")
    assert tokenizer.decode(ids) == "Hello 👋🏽<|im_end|>\n"
    assert tokenizer.decode(ids, keep_control=False) == "Hello 👋🏽\n"


def test_nothing_is_added_padded_or_cut(chatml, tmp_path):
    """Settings inside tokenizer.json that add, pad or cut tokens do not reach the examples."""
    backend = tokenizers.Tokenizer.from_file(str(chatml / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain, changed = load_tokenizer(chatml), load_tokenizer(tmp_path)
    text = "Hello world, the answer is yes."
    assert changed.encode(text) == plain.encode(text) == changed.encode_batch([text, "a"])[0]


def test_control_tokens_are_the_special_added_ones(make_folder, oracle):
    """Named, listed and flagged special tokens are control tokens; other added tokens are not."""
    think = {"content": "<think>", "special": False, "normalized": False}
    folder = make_folder(
        pad_token={"__type": "AddedToken", "content": "[PAD]", "special": True},
        added_tokens_decoder={"900": think},
        additional_special_tokens=["<extra>"],
    )
    ours, theirs = load_tokenizer(folder), oracle(folder)
    assert {"<s>", "<|im_end|>", "[PAD]", "<extra>"} <= set(ours.control_tokens)
    assert "<think>" not in ours.control_tokens
    assert ours.special == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"} == theirs.special_tokens_map
    text = "<think>Hello<extra>[PAD]</s>"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.vocab_size == len(theirs) == max(theirs.get_vocab().values()) + 1


def test_tokens_that_only_the_configuration_names_get_the_same_ids(make_folder, oracle):
    """Special tokens that tokenizer.json lacks are added in transformers' order, so that their ids agree."""
    folder = make_folder(pad_token="[PAD]", mask_token="[MASK]", sep_token="[SEP]", unk_token="[UNK]")
    text = "[MASK][SEP]Hello[PAD][UNK]"
    assert load_tokenizer(folder).encode(text) == oracle(folder).encode(text, add_special_tokens=False)


def test_special_tokens_map_counts_for_old_folders(make_folder):
    """Folders without added_tokens_decoder name their tokens in special_tokens_map.json."""
    folder = make_folder(bos_token=None)
    (folder / "special_tokens_map.json").write_text(
        '{"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}'
    )
    assert load_tokenizer(folder).special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def test_digest_changes_with_any_file(make_folder):
    """Two folders have one digest exactly when their tokenizer files are the same bytes."""
    one, two = make_folder(), make_folder()
    (two / "tokenizer.json").write_bytes((one / "tokenizer.json").read_bytes())
    assert load_tokenizer(one).digest == load_tokenizer(two).digest
    (two / "special_tokens_map.json").write_text("{}")
    assert load_tokenizer(one).digest != load_tokenizer(two).digest


def test_missing_tokenizer_names_what_was_looked_for(tmp_path):
    """A folder without tokenizer.json is refused with its path and with what it holds instead."""
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"looked for tokenizer\.json in .*found only tokenizer\.model") as refused:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(refused.value)


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[1]")])
def test_broken_files_are_refused_by_name(make_folder, name, content):
    """A file that cannot be read is named, whatever is wrong with it."""
    folder = make_folder()
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=name):
        load_tokenizer(folder)
    (folder / name).write_text("{not json")
    with pytest.raises(ModelError, match=name):
        load_tokenizer(folder)


UNKNOWN = '{"version": "1.0", "model": {"type": "Gloop"}}'


@pytest.mark.parametrize(("content", "what"), [
    ("{not json", "not a tokenizer: "), ("[" * 100_000, "not a tokenizer: "), ("", "not a tokenizer: "),
    (UNKNOWN, "does not know what is in it"), ('{"version": "9.0"}', "does not know what is in it"),
])  # fmt: skip
def test_broken_is_told_from_unknown(make_folder, content, what):
    """A damaged file is to be fetched again; a type that the library does not know asks for a newer library."""
    folder = make_folder()
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=what) as refused:
        load_tokenizer(folder)
    assert ("pip install --upgrade tokenizers" in str(refused.value)) is ("know" in what)


def test_eos_is_told_as_each_file_has_it(make_folder):
    """The three files may disagree, or name what is no token; all of it is reported, and nothing is decided."""
    folder = make_folder()
    tokenizer = load_tokenizer(folder)
    end, turn = tokenizer.control_tokens["</s>"], tokenizer.control_tokens["<|im_end|>"]
    assert eos_ids(folder, tokenizer) == {"tokenizer_config.json": [("</s>", end)]}
    (folder / "config.json").write_text(json.dumps({"eos_token_id": turn}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, end, 10**6]}))
    assert eos_ids(folder, tokenizer) == {
        "tokenizer_config.json": [("</s>", end)],
        "config.json": [("<|im_end|>", turn)],
        "generation_config.json": [("<|im_end|>", turn), ("</s>", end), (None, 10**6)],
    }
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": end}}))
    assert eos_ids(folder, tokenizer)["config.json"] == [("</s>", end)]
    bare = make_folder(eos_token=None)
    assert eos_ids(bare, load_tokenizer(bare)) == {}
    (folder / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ModelError, match=r"config\.json: eos_token_id: '</s>' is not a token's number"):
        eos_ids(folder, tokenizer)


def test_real_vocabulary_reads_and_round_trips(tmp_path):
    """GPT-2's tokenizer has its known size and gives every text back."""
    source = SHARED / "tokenizers" / "gpt2.tokenizer.json.gz"
    if not source.is_file():
        pytest.skip(f"{source} is absent")
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(source.read_bytes()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 50257
    assert tokenizer.encode("Hello world") == [15496, 995]  # OpenAI's published ids
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
