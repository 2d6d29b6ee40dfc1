"""One text read twice by one model, with updates on and off."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..eval.nll import Bucket, loss_by_position, new_cache, token_losses
from ..hf.attach import inspect, runtime_of, updates_off
from ..hf.context import fast_weights

PIECE = 1024
"""Tokens read per call."""
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class LayerUpdates:
    """Size of one layer's updates. ``relative_norm``: ||eta S|| / ||W0||, None for a quantised or zero W0."""

    index: int
    updates: int
    state_bytes: int
    relative_norm: float | None


@dataclass(frozen=True)
class Comparison:
    """Losses [N] in nats of the tokens at positions 1 to N, with updates on and off, on the same tokens and pieces."""

    on: np.ndarray
    off: np.ndarray
    seconds_on: float
    seconds_off: float
    chunk_size: int
    layers: list[LayerUpdates]

    @property
    def tokens(self) -> int:
        """N: tokens read, and as many predicted."""
        return len(self.on)

    @property
    def updates(self) -> int:
        """Updates of each layer."""
        return min((layer.updates for layer in self.layers), default=0)

    def gain(self) -> tuple[float, float | None]:
        """Mean of off - on where updates had been made, and its standard error over chunks (None for a single one)."""
        gaps = (self.off - self.on)[self.chunk_size :]
        chunks = [gaps[i : i + self.chunk_size].mean() for i in range(0, len(gaps), self.chunk_size)]
        error = float(np.std(chunks, ddof=1) / np.sqrt(len(chunks))) if len(chunks) > 1 else None
        return float(gaps.mean()), error

    def buckets(self) -> list[tuple[Bucket, Bucket]]:
        """Return (on, off) by position: the first chunk, then up to two, four, eight ... chunks."""
        edges, end = [1, self.chunk_size + 1], 2 * self.chunk_size
        while end + self.chunk_size <= self.tokens:
            edges.append(end + 1)
            end *= 2
        edges.append(self.tokens + 1)
        on, off = (loss_by_position(values[None], edges) for values in (self.on, self.off))
        return list(zip(on, off, strict=True))

    def by_chunk(self) -> list[dict[str, Any]]:
        """Return mean losses chunk by chunk: ``start`` and ``end`` are the first and last position."""
        C = self.chunk_size
        return [
            {
                "start": i + 1,
                "end": min(i + C, self.tokens),
                "on": float(self.on[i : i + C].mean()),
                "off": float(self.off[i : i + C].mean()),
            }
            for i in range(0, self.tokens, C)
        ]


def compare(model: nn.Module, ids: Sequence[int], advance: Advance | None = None, piece: int = PIECE) -> Comparison:
    """Read ``ids`` [N + 1] as one document, twice. Calls ``advance(label, tokens)`` for each piece."""
    model.eval()
    chunk_size = runtime_of(model).config.chunk_size
    rows = torch.tensor([list(ids)], device=next(model.parameters()).device)
    with torch.no_grad():  # warm-up: keeps one-off costs out of the timings
        model(input_ids=rows[:, :2], use_cache=False)
    losses, seconds = {}, {}
    for label, context in (("off", updates_off(model)), ("on", nullcontext())):
        start, cache = time.perf_counter(), new_cache(model)
        with context:
            told = advance and partial(advance, label)
            losses[label] = token_losses(model, rows, piece, cache=cache, advance=told)[0].double().cpu().numpy()
        seconds[label] = time.perf_counter() - start
    return Comparison(losses["on"], losses["off"], seconds["on"], seconds["off"], chunk_size, _layers(model, cache))


def _layers(model: nn.Module, cache: Any) -> list[LayerUpdates]:
    held, lr = fast_weights(cache), runtime_of(model).lr
    weights: dict[int, Any] = {site.index: site.projection().weight for site in runtime_of(model).sites}
    layers = []
    for info in inspect(model):
        fast, weight = held[info.index], weights[info.index]
        size = 0.0 if fast.S is None else abs(lr) * float(torch.linalg.vector_norm(fast.S[0].float()))
        norm = float(torch.linalg.vector_norm(weight.detach().float())) if weight.is_floating_point() else 0.0
        layers.append(LayerUpdates(info.index, fast.updates[0], info.state_bytes, size / norm if norm else None))
    return layers
