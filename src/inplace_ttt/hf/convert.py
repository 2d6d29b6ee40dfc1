"""Conversion between formats: whole models, adapters, the authors' release format, and sharded checkpoints.

A sharded checkpoint is a directory of torch.distributed.checkpoint (with ``.metadata``): `inplace_ttt.train` calls it
``sharded`` and puts ``config.json`` beside it, the Trainer and accelerate call it ``pytorch_model_fsdp_0``. It holds
tensors only: the model's shape comes from that file, or from another saved model.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from ..errors import UserError
from ..hub import check_conversion
from .attach import install, unwrap
from .auto import base_config
from .checkpoint import from_pretrained, load_plain, save_pretrained
from .directory import find_tokenizer, mark_config
from .release import save_release


def convert(
    source: Path, out: Path, to: str, *, base: str | None = None, config: Path | None = None, projections: bool = False
) -> None:
    """Convert ``source``, in any format, to the format ``to``: "model", "adapter", "release" or "sharded".

    The tokenizer with its chat template is copied too. Raises UserError, having written nothing, for a source that
    cannot be read or expressed.
    """
    shards = check_conversion(source, out, base, config)
    if shards is not None:
        model = _from_shards(*shards)
    else:
        model = from_pretrained(source, model=None if base is None else load_plain(base, {}))
    # Of a sharded checkpoint, the tokenizer is beside it or beside ``config``.
    tokenizer, _ = find_tokenizer(source, *([] if config is None else [config]), source.parent)
    if to == "model":
        save_pretrained(model, out, tokenizer)
    elif to == "adapter":
        save_pretrained(model, out, tokenizer, adapter_only=True, projections=projections, base=base)
    elif to == "release":
        save_release(model, out)
    else:
        out.mkdir(parents=True)
        save({"model": unwrap(model).state_dict()}, checkpoint_id=out, no_dist=True)
        unwrap(model).config.save_pretrained(out)
        mark_config(out)
    if tokenizer is not None and to in ("release", "sharded"):
        tokenizer.save_pretrained(out)


def _from_shards(shards: Path, place: Path) -> Any:
    """Load a sharded checkpoint into a model of the configuration in ``place``."""
    found, settings = base_config(place)
    if settings is None:
        raise UserError(f"{place} is a plain model without fast weights: name one that has them with --config")
    make: Any = AutoModelForCausalLM.from_config
    model = install(make(found, dtype=torch.float32), settings)
    own = unwrap(model).state_dict()
    stored = FileSystemReader(shards).read_metadata().state_dict_metadata
    prefix = "model." if any(f"model.{name}" in stored for name in own) else ""  # of the model beside an optimizer
    sizes = {n.removeprefix(prefix): getattr(x, "size", None) for n, x in stored.items() if n.startswith(prefix)}
    missing, extra = sorted(set(own) - set(sizes)), sorted(set(sizes) - set(own))
    if missing or extra:
        raise UserError(
            f"{shards} is of another model (lacks {missing[:3]}, has {extra[:3]} too many): name one of its shape with "
            "--config"
        )
    for name, size in sizes.items():
        if own[name].shape != size:
            raise UserError(f"{shards}: {name} has shape {tuple(size or ())}, the model {tuple(own[name].shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # that it is not in use
        load({"model": own} if prefix else own, checkpoint_id=shards, no_dist=True)
    return model
