"""Conversion of a session to tensors and JSON values, and back with all values checked."""

from typing import Any

import torch
from torch import Tensor

from ..core import FastWeights
from ..core.algebra import state_dtype
from ..fast.factors import fast_weights
from ..hf.attach import READING, adapting_layers
from ..hf.cache import FastCacheLayer, install
from ..hf.pending import PendingColumns
from ..hf.rows import from_tensors, to_tensors
from .diagnostics import Timeline
from .state import SessionState
from .stream import RECENT, Reader, Stream
from .text import StreamEncoder

NUMBERS = {"position": int, "cached": int, "tokens": int, "written": int, "started": bool, "recent": list}
"""Fields of a stream that are not tensors, with their types."""


def pack(session: SessionState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a session's tensors (CPU, each with its own storage) and the rest as JSON values."""
    stream, reader, encoder = session._stream, session._reader, session._encoder
    keys, layers = to_tensors(stream.cache)
    tensors = {f"context.{name}": value for name, value in keys.items()}
    fast = {}
    for index, weights in stream.fast.items():
        found = weights.all_tensors() | ({} if weights.real is None else {"real": weights.real})
        tensors |= {f"fast.{index}.{name}": value for name, value in found.items()}
        fast[str(index)] = {name: getattr(weights, name) for name in ("form", "fed", *weights.numbers)}
    if (record := stream.record) is not None:
        tensors |= {f"record.{name}": value for name, value in record_tensors(record).items()}
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
        "record": None if record is None else {"base": record.base, "starts": [list(x) for x in record.starts[0]]},
        "stream": {name: getattr(stream, name) for name in NUMBERS},
        "text": None if encoder is None else encoder.state(),
        "probe_every": session._probe_every,
        "timeline": {"every": session.timeline.every, "samples": session.timeline.to_list()},
    }
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, header


# -- and back ----------------------------------------------------------------------------------------------------------


def unpack(session: SessionState, tensors: dict[str, Tensor], header: dict[str, Any], version: int = 2) -> None:
    """Put a stored state into a new session. Raises ValueError (KeyError, TypeError) when it is invalid."""
    reader = session._reader
    left = {name: value.to(reader.device) for name, value in tensors.items()}
    if version == 1:
        upgrade(left, header, reader)
    numbers = header["stream"]
    _check(numbers.keys() == NUMBERS.keys(), "the stream's values are not those of this version")
    for name, kind in NUMBERS.items():
        _check(type(numbers[name]) is kind, f"{name} is not of type {kind.__name__}")
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
    shapes = {info.index: info.shape for info in adapting_layers(reader.model)}
    wanted = set(shapes) if stream.tokens or header["fast"] else set()
    _check({int(i) for i in header["fast"]} == wanted, "the fast weights are not those of this model's layers")
    for index, values in header["fast"].items():
        fast = unpack_fast(_take(left, f"fast.{index}."), values, reader, shapes[int(index)])
        install(stream.cache, int(index), fast)
    if reader.by_loss:
        restore_record(stream, _take(left, "record."), header.get("record"), reader)
    else:
        _check({x.seen for x in stream.fast.values()} <= {(stream.tokens,)}, "a layer has not read all the tokens")
    _check(not left, f"unknown tensors {', '.join(sorted(left)[:3])}")
    encoder = None if session.tokenizer is None else _encoder(session.tokenizer, header["text"])
    timeline, origin = _timeline(header["timeline"]), header["origin"]
    _check(origin is None or isinstance(origin, str), "origin is not a string")
    if reader.fits(stream, 1):  # a forward call fails where a shape is wrong
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
    _check(type(every) is int and every >= 0, "the timeline's interval is not a number of tokens")
    for sample in samples:
        _check(_is_number(sample["tokens"], int), "a sample's tokens are not a number")
        numbers = [sample["loss_on"], sample["loss_off"], *(x for layer in sample["layers"] for x in layer.values())]
        _check(all(x is None or isinstance(x, int | float) for x in numbers), "a sample's value is not a number")
        _check(all(type(layer["layer"]) is int for layer in sample["layers"]), "a sample's layer is not a number")
    return Timeline.from_list(samples, every=every)


def _check_settings(settings: dict[str, Any]) -> None:
    """Check numbers against what the settings allow (whole numbers in a file have no bound)."""
    numbers = [x for x in settings.values() if isinstance(x, int | float)]
    _check(all(abs(x) < 1 << 60 for x in numbers), "a setting is out of range")


def unpack_fast(
    tensors: dict[str, Tensor], values: dict[str, Any], reader: Reader, shape: tuple[int, int]
) -> FastWeights:
    """Return one layer's fast weights, checked against what this reader's model would have made."""
    D, F = shape
    source = 2 * D if reader.runtime.sites[0].target.source == "both" else D
    settings = reader.settings
    C = settings.config.chunk_size
    fast = fast_weights(1, C, settings.rule, reader.form, gates=reader.gates)
    _check(values.keys() == {"form", "fed", *fast.numbers}, "the fast weights' values are not those of this version")
    _check(values["form"] == fast.form, "the fast weights were made under other settings")
    for name in fast.numbers:
        value, kind = values[name], int | float if name == "lost" else int
        _check(
            isinstance(value, list) and len(value) == 1 and _is_number(value[0], kind), f"{name} is not about one row"
        )
        setattr(fast, name, tuple(value))
    _check(_is_number(values["fed"], int), "fed")
    fast.fed = values["fed"]
    left, kept = dict(tensors), fast.reach
    seen, held, count = fast.seen[0], fast.kept[0], getattr(fast, "count", (0,))[0]
    fast.real = real.cpu() if (real := left.pop("real", None)) is not None else None
    _check(fast.real is None or (fast.real.dtype == torch.bool and fast.real.shape == (1, fast.fed)), "real")
    _check(0 <= held <= min(kept, seen // C) and getattr(fast, "raw", (0,))[0] <= count, "kept")

    state = settings.rule.init(1, D, F, torch.zeros(0, dtype=reader.root.dtype, device="meta"))
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "z": ((1, C, F), None),
        "u": ((1, C, source), None),
        "left": ((1, count, D), state_dtype(reader.root.dtype)),
        "right": ((1, count, F), None),
        "history.z": ((1, kept * C, F), None),
        "history.u": ((1, kept * C, source), None),
        "history.v": ((1, kept * C, D), None),
        **{f"tensors.{name}": (tuple(x.shape), x.dtype) for name, x in state.items()},
        **{f"history.state.{name}": ((1, kept, *x.shape[1:]), x.dtype) for name, x in state.items()},
    }
    for name, x in left.items():
        _check(name in wanted, f"unknown tensor {name}")
        _like(x, *wanted[name], name)
    found, fast.history = _take(left, "tensors."), _take(left, "history.")
    parts = {name: left.get(name) for name in fast.parts}
    _check(reader.by_loss or (parts["z"] is not None and parts["u"] is not None), "pending tokens are missing")
    for name, part in parts.items():
        setattr(fast, name, part)
    _check(not found or found.keys() == state.keys(), "the state is not complete")
    fast.tensors = found or None
    _check(bool(fast.history) or not held, "history is missing")
    factored = parts.get("left") is not None
    _check(not (factored and found) and factored == (parts.get("right") is not None), "S is there twice, or by half")
    _check(not count or factored, "left is missing")
    _check(bool(found) or factored or seen < C or reader.by_loss, "S is missing")  # by the loss: if nothing was learned
    return fast


def record_tensors(record: PendingColumns) -> dict[str, Tensor]:
    """Return the tensors of what is pending with objective "loss"."""
    names = ("ids", "learn", "positions", "embeds", "real")
    found = {name: value for name in names if (value := getattr(record, name)) is not None}
    for column, layers in record.sliding.items():
        for i, (keys, values) in layers.items():
            found |= {f"{column}.{i}.keys": keys, f"{column}.{i}.values": values}
    return found


def restore_record(stream: Stream, tensors: dict[str, Tensor], values: Any, reader: Reader) -> None:
    """Restore a stream's pending columns, checked."""
    if values is None:
        _check(not tensors, "pending columns without their header")
        return
    if not stream.cache.get_seq_length():
        return  # versions before 0.2.0 wrote columns of a dropped context
    base, starts = values["base"], values["starts"]
    ids, n = tensors["ids"], tensors["ids"].shape[1]
    _check(_is_number(base, int) and base + n == stream.cache.get_seq_length(), "the pending columns' place")
    _check(all(len(x) == 2 and all(_is_number(k, int) for k in x) for x in starts) and bool(starts), "starts")
    _check(all(base <= column <= base + n for _, column in starts), "starts")
    for name, kind in (("ids", torch.int64), ("learn", torch.bool), ("positions", torch.int64)):
        _like(tensors[name], (1, n), kind, name)
    reader.check([i for i in ids[0].tolist() if i >= 0])
    if "real" in tensors:
        _like(tensors["real"], (1, base + n), torch.bool, "real")
    if "embeds" in tensors:
        _like(tensors["embeds"], (1, n, tensors["embeds"].shape[2]), None, "embeds")
    sliding: dict[int, dict[int, tuple[Tensor, Tensor]]] = {column: {} for _, column in starts}
    for name in [name for name in tensors if name.endswith(".keys")]:
        column, layer = map(int, name.split(".")[:2])
        keys, other = tensors[name], tensors[f"{column}.{layer}.values"]
        _check(column in sliding and keys.dim() == 4 and keys.shape[:3] == other.shape[:3], "the keys before a chunk")
        sliding[column][layer] = keys, other
    more = {name: tensors.get(name) for name in ("embeds", "real")}
    own = tuple((m, column) for m, column in starts)
    record = PendingColumns(base, ids, tensors["learn"], tensors["positions"], starts=(own,), sliding=sliding, **more)
    first = next(layer for layer in stream.cache.layers if isinstance(layer, FastCacheLayer))
    first.record = record


def upgrade(tensors: dict[str, Tensor], header: dict[str, Any], reader: Reader) -> None:
    """Turn the content of a version 1 file into version 2: tensors under their new names, updates as written."""
    names = {"S": "tensors.S", "history.0": "history.z", "history.1": "history.u", "history.2": "history.v"}
    sites = {site.index: site for site in reader.runtime.sites}
    for index, values in header["fast"].items():
        prefix = f"fast.{index}."
        for old, new in names.items():
            if prefix + old in tensors:
                tensors[prefix + new] = tensors.pop(prefix + old)
        kept = ("form", "fed", "seen", "kept", *(("count", "raw", "lost") if values.get("form") != "dense" else ()))
        same = (values.pop("rows"), values.pop("chunk_size"), values.pop("decay"))
        config = reader.settings.config
        _check(same == (1, config.chunk_size, config.decay), "the fast weights were made under other settings")
        header["fast"][index] = {name: values[name] for name in kept}
        rule, v = reader.settings.rule, tensors.get(prefix + "history.v")
        if rule.outer and rule.whole and v is not None:  # version 1 stored the raw targets
            site, C = sites[int(index)], config.chunk_size
            z, chunks = tensors[prefix + "history.z"].reshape(-1, C, tensors[prefix + "history.z"].shape[-1]), v.shape
            slow = site.slow_weight(site.projection(), rule)
            values_ = rule.values(z, v.reshape(-1, C, v.shape[-1]).to(z.dtype), slow)
            tensors[prefix + "history.v"] = values_.reshape(chunks)


def _check_context(stream: Stream, reader: Reader) -> None:
    bounded = reader.own_window is None
    _check(not bounded or stream.position == stream.cached <= reader.window + reader.sinks, "position")
    for i, layer in enumerate(stream.cache.layers):
        layer_: Any = layer
        n = layer_.get_seq_length()
        _check(_is_number(n, int), f"the length of layer {i} is not a number")
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
    """Return whether it is such a number, not below 0 (nan passes: what truncation lost of S may be nan)."""
    return isinstance(value, kind) and not isinstance(value, bool) and not value < 0


def _like(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, name: str) -> None:
    _check(tuple(x.shape) == shape, f"{name} has shape {tuple(x.shape)}, not {shape}")
    _check(x.is_floating_point() if dtype is None else x.dtype == dtype, f"{name} is {x.dtype}")


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors of a prefix from the mapping; return them without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _check(good: bool, what: str) -> None:
    if not good:
        raise ValueError(what)
