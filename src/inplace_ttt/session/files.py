"""Session files: one safetensors file with a JSON header. No code in it, nothing is executed when it is read.

The file's metadata holds ``format``, ``version``, ``header`` (JSON: model, settings, position of the stream) and
``digest`` (SHA-256 of header and tensors). It is written to a temporary file, synced and renamed, so a crash
leaves the old file or the new one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..hf.attach import READING, unwrap
from ..hub import SESSION, SESSION_VERSION, session_header
from .packing import pack, unpack
from .state import SessionState
from .writers import remember, saving

SAMPLES = 16
Kind = TypeVar("Kind", bound=SessionState)


def identity(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a model: kind, sizes, precision, settings of the fast weights, and sampled weights."""
    root = unwrap(model)
    digest = hashlib.sha256()
    for name, parameter in sorted(root.named_parameters()):
        flat = parameter.detach().flatten()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        if flat.is_floating_point():
            digest.update(flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].float().cpu().numpy().tobytes())
    fixed = {k: v for k, v in root.config.inplace_ttt.items() if k not in READING}
    return {
        "model_type": root.config.model_type,
        "dtype": str(root.dtype).removeprefix("torch."),
        "fast_weights": json.loads(json.dumps(fixed)),
        "weights": digest.hexdigest(),
        "adapters": sorted({name for layer in root.modules() for name in _switched_on(layer)}),
    }


def _switched_on(layer: nn.Module) -> list[str]:
    """Return the adapters (peft's) that a layer applies, merged or not."""
    if not hasattr(layer, "base_layer") or getattr(layer, "disable_adapters", False):
        return []
    return list(getattr(layer, "active_adapters", []))


# -- writing -----------------------------------------------------------------------------------------------------------


def save(session: SessionState, path: str | Path) -> None:
    """Write ``session`` to ``path``, or to the target of a link, atomically.

    Raises OSError when it cannot be written (the old file stays), and
    UserError when another process has written the file since the session was loaded from it or saved to it.
    """
    target = Path(path)
    if target.is_dir():
        raise UserError(f"{target} is a directory: name a file")
    if target.exists() and not target.is_file():  # a device would be replaced by the file
        raise UserError(f"{target} is not a regular file: name another one")
    session._reader.check_attached()
    tensors, header = pack(session)
    tokenizer = None if session.tokenizer is None else tokenizer_digest(session.tokenizer)
    text = json.dumps({"model": identity(session._reader.model), "tokenizer": tokenizer, **header}, sort_keys=True)
    metadata = {"format": SESSION, "version": str(SESSION_VERSION), "header": text, "digest": _digest(text, tensors)}
    with saving(session, target):
        _write(target.resolve(), tensors, metadata)


def _write(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file, all or nothing."""
    folder = target.with_name(f".{target.name}.part")  # safetensors writes another file beside its own first
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    name = folder / target.name
    try:
        save_file(tensors, name, metadata=metadata)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        name.chmod(folder.stat().st_mode & 0o666)  # as the umask says: safetensors lets only the owner read
        name.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError, AttributeError):  # not supported on every system
        handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a fast tokenizer's definition."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    """Return tensors, header and format version of a session file; UserError with the reason where it is damaged."""
    metadata, header = session_header(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete session file (cut off or damaged: {error})") from None
    if metadata.get("digest") != _digest(metadata["header"], tensors):
        raise UserError(f"{path} is damaged: its content does not match its checksum. Use a copy or read again")
    return tensors, header, int(metadata["version"])


def load(kind: Callable[..., Kind], path: str | Path, model: nn.Module, tokenizer: Any = None) -> Kind:
    """Return the session stored at ``path``, on ``model``, made by calling ``kind`` as ``Session`` is called.

    UserError, changing nothing, when the file is damaged, foreign or newer, or was written with another model,
    precision or tokenizer.
    """
    tensors, header, version = read_file(path)
    try:
        _check_model(path, identity(model), header["model"])
        if tokenizer is None and header["tokenizer"] is not None:
            raise UserError(f"{path} was written with a tokenizer: pass tokenizer=")
        if tokenizer is not None and header["tokenizer"] not in (None, tokenizer_digest(tokenizer)):
            raise UserError(f"{path} was written with another tokenizer")
        session = kind(
            model,
            tokenizer,
            window=header["window"],
            sinks=header["sinks"],
            state=header["state"],
            probe_every=header["probe_every"],
            **header["settings"],
        )
        unpack(session, tensors, header, version)
        remember(session, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return session


def _check_model(path: str | Path, have: dict[str, Any], wanted: dict[str, Any]) -> None:
    words = {
        "model_type": "on a {} model, this one is {}",
        "dtype": "on a model in {}, this one is in {}: load the model in that precision",
        "fast_weights": "with fast weights {}, this model has {}",
        "weights": "on a model with other weights",
        "adapters": "with the adapters {} switched on, this model has {}",
    }
    for key, text in words.items():
        if have[key] != wanted.get(key) and (key != "adapters" or key in wanted):  # older files lack it
            raise UserError(f"{path} was written " + text.format(wanted.get(key), have[key]))
