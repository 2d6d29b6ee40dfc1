"""A model with fast weights and its tokenizer, from one name."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..errors import UserError
from ..hf.checkpoint import from_pretrained, has_fast_weights, load_plain, tokenizer_places
from ..hf.hub_files import require_hub_id
from ..shipped import DEFAULT_MODEL


def load(model: str | Path, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Model and fast tokenizer from a directory or hub id. Computes in float32 on a CPU, as stored elsewhere.

    UserError when either cannot be loaded or the tokenizer does not tell which characters a token spans.
    """
    if Path(model) == DEFAULT_MODEL and not DEFAULT_MODEL.is_dir():
        raise UserError(f"this installation lacks the shipped model ({DEFAULT_MODEL}): install the package again")
    place = _device(device)
    loaded = from_pretrained(model, dtype=torch.float32 if place.type == "cpu" else "auto").to(place).eval()
    tokenizer = load_tokenizer(model, loaded)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"the tokenizer of {model} is not a fast one: it cannot tell which characters a token spans")
    return loaded, tokenizer


def load_baseline(model: str | Path, device: str | None = None) -> PreTrainedModel:
    """A model to compare with, plain or with fast weights; UserError when it cannot be loaded."""
    place = _device(device)
    dtype: Any = torch.float32 if place.type == "cpu" else "auto"
    path = Path(model).expanduser()
    if has_fast_weights(path):
        return from_pretrained(path, dtype=dtype).to(place).eval()  # type: ignore[no-any-return]
    if not path.is_dir():
        require_hub_id(str(model))
    plain: Any = load_plain(path if path.is_dir() else str(model), {"dtype": dtype})
    return plain.to(place).eval()  # type: ignore[no-any-return]


def load_tokenizer(model: str | Path, loaded: PreTrainedModel) -> Any:
    """The tokenizer beside a model, in its base, or of the base that an adapter names."""
    reason = "no tokenizer files"
    for place, where in tokenizer_places(model):
        if Path(place).is_dir() and not any(Path(place).glob("tokenizer*")):
            continue
        try:
            return AutoTokenizer.from_pretrained(place, **where)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise UserError(f"no tokenizer for {model} ({reason}): save one beside it with tokenizer.save_pretrained")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device
