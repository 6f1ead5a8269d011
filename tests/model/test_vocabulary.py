"""Other tokenizer files become the tokenizer that transformers makes of them, or are refused with the line that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from safetensors.numpy import save_file

from instil.errors import ModelError
from instil.model import vocabulary
from instil.model.locate import locate

TEXTS = ["Hello world", "  the fox\n\n it's 12", "naïve 🙂", "<|endoftext|>a"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def byte_level_folder(folder: Path, **config: object) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt of a small byte-level BPE, and the tokenizer they were taken from."""
    folder.mkdir()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(["Hello world, the fox is the fox of the world."] * 5, trainer)
    backend.model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    save_file({}, folder / "model.safetensors")
    return backend


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        locate(str(folder), need_weights=False)
    assert caught.value.exit_code == 4
    (line,) = caught.value.lines()
    return line


def test_vocabulary_and_merges_give_the_same_ids(tmp_path: Path) -> None:
    "GPT-2's two files, through transformers, tokenise as the tokenizer they were saved from; settings are kept."
    backend = byte_level_folder(tmp_path / "m", tokenizer_class="GPT2Tokenizer", chat_template="{{ messages }}")
    found = locate(str(tmp_path / "m"), need_weights=True).path
    converted = tokenizers.Tokenizer.from_file(str(found / "tokenizer.json"))
    for text in TEXTS:
        assert converted.encode(text, add_special_tokens=False).ids == backend.encode(text).ids
    config = json.loads((found / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}"
    assert config["eos_token"] == "<|endoftext|>"  # the class's own, which the folder leaves out
    assert (found / "vocab.json").is_symlink()
    assert not (found / "tokenizer_config.json").is_symlink()


def test_a_vocabulary_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    "vocab.json and merges.txt do not say how text is split; without a class that knows, nothing is guessed."
    byte_level_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    line = refusal(tmp_path / "m")
    assert line.startswith(str(tmp_path / "m" / "vocab.json"))
    assert "give the model's tokenizer.json" in line


def test_missing_packages_are_named_with_the_line_that_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Without sentencepiece, or tiktoken, the error is what to type."
    monkeypatch.setattr(vocabulary, "_installed", lambda package: False)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    assert refusal(folder).endswith("packages are missing: sentencepiece protobuf; pip install sentencepiece protobuf")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert refusal(folder).endswith("packages are missing: tiktoken; pip install tiktoken")


def test_a_tiktoken_file_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The file holds no rule for splitting; only where transformers knows the model's is it read."
    monkeypatch.setattr(vocabulary, "_installed", lambda package: True)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen"}')
    (folder / "qwen.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    assert "does not say how to split text" in refusal(folder)


def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Whatever transformers makes of a broken file, it is one line that names it, and the cache stays empty."
    monkeypatch.setattr(vocabulary, "_installed", lambda package: True)
    byte_level_folder(tmp_path / "m", tokenizer_class="GPT2Tokenizer")
    (tmp_path / "m" / "vocab.json").write_text("{broken")
    line = refusal(tmp_path / "m")
    assert line.startswith(str(tmp_path / "m" / "vocab.json"))
    assert "transformers cannot read this tokenizer" in line
    assert list((tmp_path / "cache" / "instil" / "models").iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_its_own_ids(tmp_path: Path, kind: str) -> None:
    "Both kinds of sentencepiece model, through transformers, tokenise as sentencepiece itself does."
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    folder = tmp_path / "m"
    folder.mkdir()
    lines = [f"Hello world, the answer is yes {n}. A quick brown fox jumps over lazy dogs." for n in range(300)]
    (tmp_path / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(folder / "tokenizer"), model_type=kind, vocab_size=350,
        byte_fallback=kind == "bpe", normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    named = {"bpe": "LlamaTokenizer", "unigram": "T5Tokenizer"}[kind]
    model_type = {"bpe": "llama", "unigram": "t5"}[kind]
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": named, "unk_token": "<unk>", "eos_token": "</s>", "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = locate(str(folder), need_weights=False).path
    converted = tokenizers.Tokenizer.from_file(str(found / "tokenizer.json"))
    spoken = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ["Hello world", "the answer is 12", "a fox jumps", "Hello  dogs"]:
        assert converted.encode(text, add_special_tokens=False).ids == spoken.EncodeAsIds(text), text


def test_only_a_whole_set_of_files_is_taken() -> None:
    "vocab.json alone is not a tokenizer; a sentencepiece model comes first."
    assert vocabulary.convertible(["vocab.json"]) is None
    assert vocabulary.convertible(["vocab.json", "merges.txt"]) == "vocab.json"
    assert vocabulary.convertible(["merges.txt", "spiece.model", "vocab.json"]) == "spiece.model"
    assert vocabulary.convertible(["x.tiktoken"]) == "x.tiktoken"
