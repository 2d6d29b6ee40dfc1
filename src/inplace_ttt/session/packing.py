"""A session as tensors and JSON values, and back with everything checked."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import FastWeights
from ..core.scan import state_dtype
from ..core.state import ROLLBACK_TOKENS
from ..hf.attach import READING, inspect
from ..hf.rows import from_tensors, to_tensors
from .diagnostics import Timeline
from .stream import RECENT, Reader, Stream
from .text import StreamEncoder

if TYPE_CHECKING:
    from .session import Session

NUMBERS = {"position": int, "cached": int, "tokens": int, "written": int, "started": bool, "recent": list}
"""What a stream is besides its tensors."""


def pack(session: "Session") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A session's tensors (CPU, each with its own storage) and the rest as JSON values."""
    stream, reader, encoder = session._stream, session._reader, session._encoder
    keys, layers = to_tensors(stream.cache)
    tensors = {f"context.{name}": value for name, value in keys.items()}
    fast = {}
    for index, weights in stream.fast.items():
        found, values = pack_fast(weights)
        tensors |= {f"fast.{index}.{name}": value for name, value in found.items()}
        fast[str(index)] = values
    if stream.logits is not None:
        tensors["logits"] = stream.logits
    header = {
        "origin": session.origin,
        "settings": {name: getattr(reader.config, name) for name in READING},
        "window": None if reader.own_window else reader.window,
        "sinks": reader.sinks,
        "state": reader.form,
        "context": layers,
        "fast": fast,
        "stream": {name: getattr(stream, name) for name in NUMBERS},
        "text": None if encoder is None else encoder.state(),
        "probe_every": session._probe.every,
        "timeline": {"every": session.timeline.every, "samples": session.timeline.to_list()},
    }
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, header


def pack_fast(fast: FastWeights) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One layer's fast weights as tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in fast.__dict__.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
            tensors |= {f"{name}.{i}": part for i, part in enumerate(value)}
        elif value is not None:
            values[name] = value
    return tensors, values


# -- and back ----------------------------------------------------------------------------------------------------------


def unpack(session: "Session", tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Puts a stored state into a new session. ValueError (KeyError, TypeError) where it makes no sense."""
    reader = session._reader
    left = {name: value.to(reader.device) for name, value in tensors.items()}
    numbers = header["stream"]
    _check(numbers.keys() == NUMBERS.keys(), "the stream's values are not those of this version")
    for name, kind in NUMBERS.items():
        _check(type(numbers[name]) is kind, f"{name} is no {kind.__name__}")
        _check(kind is list or numbers[name] >= 0, f"{name} is negative")
    _check(all(type(i) is int for i in numbers["recent"]) and len(numbers["recent"]) <= RECENT, "recent holds no ids")
    reader.check(numbers["recent"])
    _check_settings(header["settings"])
    stream = Stream(from_tensors(_take(left, "context."), header["context"], reader.root.config), **numbers)
    _check_context(stream, reader)
    stream.logits = left.pop("logits", None)
    _check((stream.logits is None) == (stream.position == 0), "logits")
    if stream.logits is not None:
        size = reader.root.config.get_text_config().vocab_size
        _check(stream.logits.shape == (size,) and stream.logits.is_floating_point(), "logits")
    shapes = {info.index: info.shape for info in inspect(reader.model)}
    wanted = set(shapes) if stream.tokens else set()
    _check({int(i) for i in header["fast"]} == wanted, "the fast weights are not those of this model's layers")
    for index, values in header["fast"].items():
        fast = unpack_fast(_take(left, f"fast.{index}."), values)
        _check_fast(fast, session, shapes[int(index)])
        reader.install(stream, int(index), fast)
    _check({fast.seen for fast in stream.fast.values()} <= {(stream.tokens,)}, "a layer has not read all the tokens")
    _check(not left, f"unknown tensors {', '.join(sorted(left)[:3])}")
    encoder = None if session.tokenizer is None else _encoder(session.tokenizer, header["text"])
    timeline, origin = _timeline(header["timeline"]), header["origin"]
    _check(origin is None or isinstance(origin, str), "origin is no name")
    if reader.fits(stream, 1):  # tried out: whether all shapes are this model's
        for _ in reader.feed(stream.copy(), [0]):
            pass
    session.origin = origin
    session._stream, session._encoder, session._timeline = stream, encoder, timeline


def _encoder(tokenizer: Any, text: Any) -> StreamEncoder:
    if text is None:
        return StreamEncoder(tokenizer)
    parts, wait = (text["anchor"], text["held"]), text["wait"]
    _check(all(isinstance(part, str) for part in parts) and type(wait) is int and wait > 0, "text")
    for part in parts:
        part.encode()
    return StreamEncoder.restore(tokenizer, text)


def _timeline(values: Any) -> Timeline:
    every, samples = values["every"], values["samples"]
    _check(type(every) is int and every >= 0, "the timeline's interval is no number of tokens")
    for sample in samples:
        _check(_is_number(sample["tokens"], int), "a sample's tokens are no number")
        numbers = [sample["loss_on"], sample["loss_off"], *(x for layer in sample["layers"] for x in layer.values())]
        _check(all(x is None or isinstance(x, int | float) for x in numbers), "a sample holds what is no number")
        _check(all(type(layer["layer"]) is int for layer in sample["layers"]), "a sample's layer is no number")
    return Timeline.from_list(samples, every=every)


def _check_settings(settings: dict[str, Any]) -> None:
    """Of numbers that a setting could not be (whole numbers in a file have no bound)."""
    _check(all(x is None or abs(x) < 1 << 60 for x in settings.values()), "a setting is out of range")


def unpack_fast(tensors: dict[str, Tensor], values: dict[str, Any]) -> FastWeights:
    """The inverse of ``pack_fast``."""
    fast = FastWeights(values["rows"], values["chunk_size"], decay=values["decay"], form=values["form"])
    names = set(fast.__dict__)
    whole = {name: value for name, value in tensors.items() if "." not in name}
    parts: dict[str, tuple[Tensor, ...]] = {}
    for name in sorted(set(tensors) - set(whole)):
        stem = name.split(".")[0]
        parts[stem] = (*parts.get(stem, ()), tensors[name])
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    found = {**whole, **parts, **lists}
    _check(found.keys() <= names, f"unknown values {', '.join(sorted(found.keys() - names))}")
    for name, default in fast.__dict__.items():
        _check(name in found or default is None, f"{name} is missing")
    fast.__dict__.update(found)
    fast.real = None if fast.real is None else fast.real.cpu()
    return fast


def _check_fast(fast: FastWeights, session: "Session", shape: tuple[int, int]) -> None:
    """A row's fast weights must be what this session's model would have made."""
    D, F = shape
    config, dtype = session._reader.config, session._reader.root.dtype
    C, kept = config.chunk_size, math.ceil(ROLLBACK_TOKENS / config.chunk_size)
    same = (fast.rows, fast.chunk_size, fast.decay, fast.form) == (1, C, config.decay, session._reader.form)
    _check(same, "the fast weights were made under other settings")
    for name, kind in (("seen", int), ("kept", int), ("count", int), ("raw", int), ("lost", int | float)):
        value = getattr(fast, name)
        _check(len(value) == 1 and _is_number(value[0], kind), f"{name} is not about one row")
    _check(_is_number(fast.fed, int) and fast.raw[0] <= fast.count[0], "fed or raw")
    _check(fast.real is None or (fast.real.dtype == torch.bool and fast.real.shape == (1, fast.fed)), "real")
    exact = state_dtype(dtype)
    N = fast.count[0]
    _like(fast.S, (1, D, F), exact, "S", needed=False)
    _like(fast.left, (1, N, D), exact, "left", needed=N > 0)
    _like(fast.right, (1, N, F), None, "right", needed=N > 0)
    _check(fast.S is None or fast.left is None, "S is there twice")
    _check(fast.form != "dense" or fast.left is None, "left")
    _like(fast.z, (1, C, F), None, "z", needed=True)
    _like(fast.u, (1, C, D), None, "u", needed=True)
    _check(0 <= fast.kept[0] <= min(kept, fast.seen[0] // C), "kept")
    _check(fast.history is None or len(fast.history) == 3, "history")
    _check((fast.history is None) <= (fast.kept[0] == 0), "history")
    for x, width in zip(fast.history or (), (F, D, D), strict=False):
        _like(x, (1, x.shape[1], width), None, "history", needed=True)
        _check(x.shape[1] % C == 0 and x.shape[1] >= fast.kept[0] * C, "history")
    _check(fast.S is not None or fast.left is not None or fast.seen[0] < C, "S is missing")


def _check_context(stream: Stream, reader: Reader) -> None:
    bounded = reader.own_window is None
    _check(not bounded or stream.position == stream.cached <= reader.window + reader.sinks, "position")
    for i, layer in enumerate(stream.cache.layers):
        layer_: Any = layer
        n = layer_.get_seq_length()
        _check(_is_number(n, int), f"the length of layer {i} is no number")
        held = min(n, layer_.sliding_window - 1) if layer_.is_sliding else n
        _check(layer_.is_sliding or n == stream.cached, f"layer {i} holds {n} tokens of {stream.cached}")
        _check(n <= stream.cached, f"layer {i} holds more tokens than were read")
        if layer_.keys is None:
            _check(held == 0, f"keys of layer {i} are missing")
            continue
        shape = (*layer_.keys.shape[:2], held, layer_.keys.shape[3])
        _check(tuple(layer_.keys.shape) == shape and shape[0] == 1, f"keys of layer {i}")
        _check(layer_.values.shape[:3] == layer_.keys.shape[:3], f"values of layer {i}")


def _is_number(value: Any, kind: Any) -> bool:
    """Whether it is one, not below 0 (nan passes: what was lost of S may be that)."""
    return isinstance(value, kind) and not isinstance(value, bool) and not value < 0


def _like(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None, name: str, needed: bool) -> None:
    _check(x is not None or not needed, f"{name} is missing")
    if x is not None:
        _check(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}")
        _check(x.is_floating_point() if dtype is None else x.dtype == dtype, f"{name} is {x.dtype}")


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Removes and returns the tensors of a prefix, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
