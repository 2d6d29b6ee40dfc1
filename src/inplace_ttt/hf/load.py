"""A model and its tokenizer from one name: a directory, a hub id, a GGUF file, or the shipped model.

All commands load models through this module.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM, PreTrainedModel

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..hub import check_gguf, require_hub_id
from ..shipped import DEFAULT_MODEL, SHIPPED
from .attach import PLAIN, install, is_attached, runtime_of
from .checkpoint import from_pretrained, has_fast_weights, load_plain
from .directory import find_tokenizer

WORDS = 200
"""Number of words of a converted tokenizer's vocabulary to check."""


def load(
    model: str | Path,
    device: str | None = None,
    *,
    objective: str | None = None,
    window: int | None = None,
    tokenizer: str | Path | None = None,
    **settings: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a model with fast weights, as ``load_model`` does, and its fast tokenizer.

    ``objective``: for a plain model, which is then attached with it ("loss" needs no training) and these
    ``settings``. ``window``: a plain Llama reads through a sliding window of so many tokens.
    ``tokenizer``: a directory or hub id to take it from instead.

    UserError when either cannot be loaded, a plain model gets no objective, a model with fast weights gets another
    one than its own, or the tokenizer cannot return character offsets.
    """
    model, is_gguf = _place_of(model), Path(model).suffix == ".gguf"
    config = None if objective is None else InPlaceTTTConfig(objective=objective, **settings)
    if config is None and window is None and not is_gguf:
        loaded = load_model(model, device)
    else:
        loaded = load_baseline(model, device, window)
        if is_attached(loaded):
            if config is not None and (settings or runtime_of(loaded).config.objective != objective):
                raise UserError(f"{model} has fast weights already: leave the objective out")
        elif config is None:
            raise UserError(f"{model} {PLAIN}")
        else:
            install(loaded, config)
    if tokenizer is not None:
        words: Any = AutoTokenizer.from_pretrained(tokenizer)
    elif is_gguf:
        words = AutoTokenizer.from_pretrained(Path(model).parent, gguf_file=Path(model).name)
        check_words(words, model)
    else:
        words = load_tokenizer(model)
    if not getattr(words, "is_fast", False):
        raise UserError(f"the tokenizer of {model} is not a fast one: it cannot tell which characters a token spans")
    return loaded, words


def load_model(model: str | Path, device: str | None = None, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Load a model with fast weights from a directory, a hub id or ``SHIPPED``, ready to read.

    ``device`` None: the GPU if there is one. ``dtype`` None: float32 on a CPU, as stored elsewhere. UserError when it
    cannot be loaded or the device cannot be used.
    """
    place = find_device(device)
    how = dtype or (torch.float32 if place.type == "cpu" else "auto")
    return from_pretrained(_place_of(model), dtype=how).to(place).eval()  # type: ignore[no-any-return]


def load_baseline(model: str | Path, device: str | None = None, window: int | None = None) -> PreTrainedModel:
    """Load a model, plain (a GGUF file, too) or with fast weights; UserError when it cannot be loaded.

    ``window``: of a plain Llama, which is loaded as a Mistral then: they differ only in that.
    """
    place, model = find_device(device), _place_of(model)
    path = Path(model).expanduser()
    on_cpu = place.type == "cpu"
    loaded: Any
    if path.suffix == ".gguf":
        check_gguf(path)
        dtype = torch.float32 if on_cpu else torch.bfloat16
        loaded = load_plain(path.parent, {"dtype": dtype, "gguf_file": path.name})
    elif has_fast_weights(path):
        loaded = load_model(path, device)
    else:
        if not path.is_dir():
            require_hub_id(str(model))
        loaded = load_plain(path if path.is_dir() else str(model), {"dtype": torch.float32 if on_cpu else "auto"})
    if window is not None:
        if is_attached(loaded):
            raise UserError(f"{model} has fast weights already: a window can be given to a plain model")
        if loaded.config.model_type != "llama":
            raise UserError(f"a window can be given to a plain Llama, not to a {loaded.config.model_type} model")
        values = {k: v for k, v in loaded.config.to_dict().items() if k not in ("model_type", "architectures")}
        slides = MistralForCausalLM(MistralConfig(**{**values, "sliding_window": window})).to(loaded.dtype)
        slides.load_state_dict(loaded.state_dict())
        slides.generation_config, loaded = loaded.generation_config, slides
    return loaded.to(place).eval()  # type: ignore[no-any-return]


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer beside a model, in its base, or of the base that an adapter names. UserError without one."""
    tokenizer, reason = find_tokenizer(model)
    if tokenizer is None:
        raise UserError(f"no tokenizer for {model} ({reason}): save one beside it with tokenizer.save_pretrained")
    return tokenizer


def check_words(tokenizer: Any, model: str | Path) -> None:
    """Raise UserError if a converted tokenizer splits words of its own vocabulary.

    transformers 5.17 makes such tokenizers of GGUF files that list no merges (Gemma 3's, say): the model runs, badly.
    """
    vocabulary = tokenizer.get_vocab()
    words = [w for w in sorted(vocabulary) if w[:1] in "▁Ġ" and 4 < len(w) < 12 and w[1:].isascii() and w[1:].isalpha()]
    words = words[:: max(1, len(words) // WORDS)]
    split = []
    for word in words:
        written = (word[1:], f" {word[1:]}")  # some tokenizers put a space before every text
        if not any(vocabulary[word] in tokenizer(text, add_special_tokens=False).input_ids for text in written):
            split.append(word[1:])
    if len(split) > len(words) / 20:
        raise UserError(
            f"transformers {transformers.__version__} converts the tokenizer of {model} wrongly: it splits "
            f"{split[0]!r}, a word of its vocabulary. Update transformers, or load the model from a directory that has "
            "its own tokenizer"
        )


def _place_of(model: str | Path) -> str | Path:
    """Return the shipped model's directory for its name; other names unchanged."""
    place = DEFAULT_MODEL if model == SHIPPED else model
    if Path(place) == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise UserError(f"this installation lacks the shipped model ({DEFAULT_MODEL}): install the package again")
    return place


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; None: the GPU, if any. UserError when it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
