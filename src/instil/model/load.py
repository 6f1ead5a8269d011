"""A model folder to a transformers model whose attention is ours, probed before use; what cannot be isolated is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from instil.errors import MachineError, ModelError
from instil.model.attention import Layout, attention, layout_of
from instil.model.finite import not_finite
from instil.model.head import head_of
from instil.types import Pack

# Words in a config's model_type or layer types, or in a module's class name, of layers that carry state from token to
# token outside attention, so that documents of a pack would leak into each other.
RECURRENT = ("mamba", "rwkv", "recurrent", "linear_attention", "deltanet", "lightning", "short_conv", "retnet", "xlstm")
# What the class that saved a model was made for, by a part of its name.
OTHER_HEADS = {
    "SequenceClassification": "a classifier or reward model", "RewardModel": "a reward model",
    "TokenClassification": "a classifier of tokens", "MaskedLM": "an encoder", "QuestionAnswering": "an extractive reader",
    "Image": "an image model", "Vision": "an image model", "Audio": "an audio model",
}  # fmt: skip
EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight")
VOCABULARY = "take model and tokenizer from the same place, or resize the embeddings and save the model again"
IN_LAYER = re.compile(r"(.*?)\.\d+\.")  # the name of a tensor of a layer: what the layers are, and which
# Keys of a config.json that say how much of what is drawn at random; a classifier's or a summary's are of other heads.
DRAWING = re.compile(r"^(?!.*(?:classif|summary|vision|audio)).*(?:drop|jitter)")
PROBE_WINDOW = 3  # tokens that windows are narrowed to
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative to the hidden states' norm


def device_named(name: str) -> torch.device:
    """ "auto" = the first CUDA device, else the CPU; any other name must exist here."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    present = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in (*present, "cuda" if len(present) > 1 else "cpu"):
        raise MachineError.at("run.device", f"{name!r} is not here", f"use one of: {', '.join(present)}")
    return torch.device(name)


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    probe: bool = True,
    longest_tokens: int = 0,
    highest_token: int = -1,
) -> PreTrainedModel:
    """Load a causal language model from a local folder in `dtype`, with attention `instil_loop`.

    probe: compare the model on packs of documents and of branches with the model on each alone, before anything depends
    on it.
    longest_tokens: of the examples to come; a model that would treat them otherwise in a pack than alone is refused.
    highest_token: the highest id in them; a model without an embedding for it is refused.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    config = read_config(folder)
    refuse_recurrent(config, folder)
    refuse_other_heads(config, folder)
    refuse_lengths(config, longest_tokens, folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, attn_implementation="eager", use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever transformers makes of a broken folder
        _refuse_other_vocabulary(config, folder)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError.at(folder, f"does not load: {first}", "check the folder, or save the model again") from error
    net: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would fill them with random numbers
        what = f"has no weights for {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if missing[5:] else "")
        raise ModelError.at(folder, what, "save the model again, or use a complete one")
    refuse_unused_weights(net, sorted(loaded[1]["unexpected_keys"]), folder)
    if type(net).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError.at(folder, f"{type(net).__name__} is not a causal language model", "use a text decoder")
    if not net._can_set_attn_implementation():
        what = f"{type(net).__name__} does not let its attention be chosen, so packs cannot be isolated"
        raise ModelError.at(folder, what, "use a model class with transformers' attention interface")
    if bad := not_finite(net.named_parameters()):
        what = f"{bad[0]} holds NaN or infinity" + (f", and so do {len(bad) - 1} more tensors" if bad[1:] else "")
        raise ModelError.at(folder, what, "use a sound copy of the model", "not finite")
    refuse_absent_tokens(net, folder, highest_token)
    net.to(device)  # type: ignore[arg-type]
    net.eval()
    net.set_attn_implementation("instil_loop")
    if probe:
        probe_isolation(net, folder)
        probe_window(net, folder, longest_tokens)
    return net


def read_config(folder: Path) -> Any:
    """The configuration of a model folder. Raises ModelError where transformers cannot read it."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError.at(folder / "config.json", f"not usable: {first}", "use a model transformers knows") from error


def refuse_recurrent(config: Any, place: object) -> None:
    """Refuse, by name, models in which tokens meet outside attention (linear attention, state spaces, convolutions)."""
    text = config.get_text_config()
    kinds = {str(config.model_type), str(text.model_type), *map(str, getattr(text, "layer_types", None) or ())}
    kinds |= {
        name for name in ("ssm_cfg", "mamba_d_state", "conv_L_cache", "linear_num_key_heads") if hasattr(text, name)
    }
    words = (*RECURRENT, "ssm", "conv", "linear_num")
    for kind in sorted(kinds):
        if any(word in kind.lower() for word in words):
            what = f"{config.model_type}: its layers ({kind}) carry state from document to document outside attention"
            raise ModelError.at(place, what, "packs cannot be isolated exactly; use a pure attention model")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError.at(place, f"{config.model_type} is an encoder-decoder", "use a causal language model")


def refuse_other_heads(config: Any, place: object) -> None:
    """Refuse, by the class that saved it, a model that was made for something else than writing text: transformers would
    load its trunk, and with tied embeddings nobody would notice (a reward model, an encoder)."""
    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    causal = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    writes = ("CausalLM", "LMHead", "ForConditionalGeneration")  # the last: transformers decides by the configuration
    if names and not any(name in causal or any(word in name for word in writes) for name in names):
        kinds = [kind for word, kind in OTHER_HEADS.items() if any(word in name for name in names)]
        what = f"{', '.join(names)} is {kinds[0] if kinds else 'not a causal language model'}"
        raise ModelError.at(place, what, "use a causal language model (its config.json names ...ForCausalLM)")


def refuse_unused_weights(net: PreTrainedModel, unused: list[str], place: object) -> None:
    """Refuse weights of layers that config.json does not speak of: without them it is another model. (Others, of a vision
    tower or of further heads, may stay behind, and so may masks that old models were saved with.)"""
    own = set(net.state_dict())
    stacks = {found[1] for name in own if (found := IN_LAYER.match(name))}
    left = []
    for name in unused:
        found, of, kind = IN_LAYER.match(name), *name.rpartition(".")[::2]
        counts = kind.startswith("weight") or (kind == "bias" and f"{of}.weight" in own)
        if found and found[1] in stacks and counts:
            left.append(name)
    if left:
        more = f" and {len(left) - 3} more" if left[3:] else ""
        what = f"has weights that its config.json leaves out: {', '.join(left[:3])}{more}"
        raise ModelError.at(place, what, "use the config.json that these weights were saved with")


def refuse_absent_tokens(net: PreTrainedModel, place: object, highest_token: int) -> None:
    """Refuse examples with token ids for which the model has no embedding. (A tokenizer may know more than the model has,
    as Gemma 3's text models' does, as long as no example has such a token.)"""
    rows = int(net.get_input_embeddings().weight.shape[0])  # type: ignore[index,union-attr]
    if highest_token >= rows:
        what = f"the examples have the token {highest_token:,}, for which there is no embedding"
        raise ModelError.at(place, f"{what}: {_numbers(net.config, f'{rows:,}', place)}", VOCABULARY)


def _refuse_other_vocabulary(config: Any, folder: Path) -> None:
    """Raise ModelError where it is the number of embeddings for which a model does not load."""
    said = getattr(config.get_text_config(), "vocab_size", None)
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(SafetensorError), safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(EMBEDDINGS) and shape and said not in (None, shape[0]):
                    what = f"{name} does not fit config.json: {_numbers(config, f'{shape[0]:,}', folder)}"
                    raise ModelError.at(file, what, VOCABULARY)


def _numbers(config: Any, rows: str, folder: object) -> str:
    """What config.json, the weights and the tokenizer say of the vocabulary."""
    said = f"vocab_size is {config.get_text_config().vocab_size:,}, the embedding has {rows} rows"
    try:
        ids = Tokenizer.from_file(str(Path(str(folder)) / "tokenizer.json")).get_vocab(with_added_tokens=True).values()
    except Exception:  # tokenizers raises nothing narrower; the model's own numbers are said all the same
        return said
    return f"{said}, the tokenizer's ids go up to {max(ids, default=-1):,}"


def refuse_lengths(config: Any, longest_tokens: int, place: object) -> None:
    """Refuse examples longer than a limit beyond which a model's attention or positions depend on more than the example.

    Attention chunks are not cut exactly yet; rotary frequencies of the kinds `longrope` and `dynamic` change for the
    whole pack with its longest document. (Sliding windows are exact; `probe_window` makes sure of each model's.)
    """
    text = config.get_text_config()
    limits: dict[str, Any] = {"attention chunks": getattr(text, "attention_chunk_size", None)}
    rope = getattr(text, "rope_parameters", None) or {}
    for found in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if found.get("rope_type") in ("longrope", "dynamic"):
            most = found.get("original_max_position_embeddings") or text.max_position_embeddings
            limits[f"{found['rope_type']} positions, which change"] = most
    for what, most in limits.items():
        if most is not None and longest_tokens > most:
            problem = f"{config.model_type} has {what} at {most:,} tokens, and an example has {longest_tokens:,}"
            raise ModelError.at(place, problem, f"set pack.tokens to at most {most}, or use another model")


def probe_isolation(net: PreTrainedModel, place: object) -> None:
    """Refuse a model whose packed documents, or branches of a shared prefix, differ from the same tokens alone, or whose
    logits are not our head's.

    The reference is the model itself on the tokens alone, with its own plain attention and its own logits.
    """
    _exactly(net, lambda: _isolation(net, place))


def _isolation(net: PreTrainedModel, place: object) -> None:
    vocabulary = int(net.get_input_embeddings().weight.shape[0])  # type: ignore[index,union-attr]
    first, second = (np.random.Philox(key=[7, n]).random_raw(n).astype(np.uint64) % vocabulary for n in (5, 7))
    other = (first + np.uint64(1)) % np.uint64(vocabulary)
    for shared, between in ((0, "documents of a pack"), (3, "branches of a shared prefix")):
        with _running(net, place, between):
            alone = _alone(net, second)
            packed = _last_branch(net, first, second, shared)
            perturbed = _last_branch(net, other, second, shared)
            found = head_of(net).logits(packed)
        if float((packed - perturbed).norm()) > 1e-4 * float(packed.norm()):
            what = f"{_kind(net)} leaks between the {between}"
            raise ModelError.at(place, what, "it cannot be trained on packs; use another model")
        difference = float((found - alone).norm()) / float(alone.norm())
        if not difference < PROBE_TOLERANCE.get(net.dtype, 0.1):
            what = f"{_kind(net)}: logits in {between} differ from the model's own by {difference:.2g} of their norm"
            raise ModelError.at(place, what, "its head or positions are not supported; use another model")


def probe_window(net: PreTrainedModel, place: object, longest_tokens: int) -> None:
    """Refuse a model with a sliding window that it does not tell its attention of, where an example is longer than it.

    Its windows are narrowed to a few tokens for a while, all by the same amount, so that a short text shows the difference.
    """
    window = getattr(net.config.get_text_config(), "sliding_window", None)
    if window and longest_tokens > window:
        _exactly(net, lambda: _window(net, place, window, longest_tokens))


def _window(net: PreTrainedModel, place: object, window: int, longest_tokens: int) -> None:
    vocabulary = int(net.get_input_embeddings().weight.shape[0])  # type: ignore[index,union-attr]
    tokens = np.random.Philox(key=[7, 9]).random_raw(9).astype(np.uint64) % vocabulary
    with _narrowed(net, window - PROBE_WINDOW), _running(net, place, "a window"):
        alone = _alone(net, tokens)
        found = head_of(net).logits(_last_branch(net, tokens[:5], tokens, 2))
    difference = float((found - alone).norm()) / float(alone.norm())
    if not difference < PROBE_TOLERANCE.get(net.dtype, 0.1):
        what = f"{_kind(net)} does not tell its attention of its window of {window:,} tokens"
        remedy = f"an example has {longest_tokens:,}: set pack.tokens to at most {window}, or use another model"
        raise ModelError.at(place, what, remedy)


def _exactly(net: PreTrainedModel, check: Callable[[], None]) -> None:
    """Where a check fails, once more with parameters in float32: in bfloat16 a token's experts may be others for noise."""
    try:
        check()
    except ModelError:
        if net.dtype not in (torch.bfloat16, torch.float16):
            raise
        before = [(p, p.data) for p in net.parameters()]  # buffers such as rotary frequencies are float32 already
        try:
            for p, data in before:
                p.data = data.float()
            check()
        finally:
            for p, data in before:
                p.data = data


def probe_training(net: PreTrainedModel, place: Path) -> list[str]:
    """Refuse a model that drops some of its attention while it learns; a line on what else it then draws at random.

    Attention is computed in parts that no dropout is exact in. What is dropped elsewhere stays as the model's makers wanted
    it; the examples that share a prefix share what is drawn there.
    """
    device = next(net.parameters()).device
    config = net.config.get_text_config()
    drawing = {key: x for key, x in config.to_dict().items() if isinstance(x, float) and 0 < x and DRAWING.search(key)}
    inside = {key: x for key, x in drawing.items() if "att" in key}
    tokens = np.arange(3, dtype=np.uint64) % config.vocab_size
    training, forked = net.training, [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(forked), _running(net, place, "a step of training"):
            before = _random_state(device)
            _last_branch(net.train(), tokens, tokens, 1)
            drawn = not torch.equal(before, _random_state(device))
    except ModelError as error:
        if error.problems[0].rule != "dropout" or not inside:
            raise
        what = f"{_listed(inside)}: dropout in attention is not exact in a pack"
        raise ModelError.at(place / "config.json", what, f"set {' and '.join(inside)} to 0 there") from error
    finally:
        net.train(training)
    if not drawn:
        return []
    what = _listed({key: x for key, x in drawing.items() if key not in inside}) or "its routing or the like"
    return [f"the model draws at random while it learns ({what}); examples share the draws of what they begin with"]


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{key}={x:g}" for key, x in numbers.items())


def _kind(net: PreTrainedModel) -> str:
    return f"{type(net).__name__} ({net.config.model_type})"


@contextmanager
def _running(net: PreTrainedModel, place: object, what: str) -> Iterator[None]:
    """Without gradients, and with whatever goes wrong said in one line that names the place."""
    try:
        with torch.no_grad():
            yield
    except ModelError as error:  # of attention, which knows no more than the layer's class
        problem = error.problems[0]
        raise ModelError.at(place, f"{problem.place} {problem.what}", problem.remedy, problem.rule) from error
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError.at(place, f"{_kind(net)} does not run on {what}: {first}", "use another model") from error


@contextmanager
def _narrowed(net: PreTrainedModel, by: int) -> Iterator[None]:
    """Every sliding window of the model smaller by so many tokens, for a while."""
    holders: list[Any] = [net.config.get_text_config(), *net.modules()]
    before = [(x, w) for x in holders if isinstance(w := getattr(x, "sliding_window", None), int) and w > by]
    try:
        for holder, window in before:
            holder.sliding_window = window - by
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def _alone(net: PreTrainedModel, tokens: np.ndarray) -> Tensor:
    """The model's own float32 logits of a text by itself."""
    with attention(net, "eager"):
        ids = torch.from_numpy(tokens.astype(np.int64)).to(next(net.parameters()).device)[None]
        logits: Tensor = net(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def _last_branch(net: PreTrainedModel, first: np.ndarray, second: np.ndarray, shared: int) -> Tensor:
    """Hidden states of `second` in a pack of its first `shared` tokens, `first` as one branch after them (as a document
    where nothing is shared), and the rest of `second` as another."""
    a, b, n = shared, shared + len(first), len(first) + len(second)
    none = np.zeros(0, np.int32)
    pack = Pack(
        tokens=np.concatenate([second[:a], first, second[a:]]).astype(np.int32),
        positions=np.concatenate([np.arange(b), np.arange(a, len(second))]).astype(np.int32),
        reach=np.repeat([n, b, n], [a, b - a, n - b]).astype(np.int32),
        at=none, target=none, weight=none.astype(np.float32), owner=none, examples=(),
    )  # fmt: skip
    hidden = hidden_states(net, pack)
    return torch.cat([hidden[:a], hidden[b:]])


def hidden_states(net: PreTrainedModel, pack: Pack, layout: Layout | None = None) -> Tensor:
    """The model's last hidden states [n, d] of a pack's n tokens. layout: other than the pack's own (train/trunk.py)."""
    device = next(net.parameters()).device
    tokens, positions = (torch.from_numpy(x).to(device, torch.int64)[None] for x in (pack.tokens, pack.positions))
    output = net.base_model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=None,
        use_cache=False,
        instil_layout=layout or layout_of(pack, device),
    )
    return output.last_hidden_state[0]
