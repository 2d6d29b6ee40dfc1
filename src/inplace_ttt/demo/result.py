"""One text read twice by one model, with updates on and off, and the figures of it."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.diagnostics import relative_norm
from ..errors import UserError
from ..eval.nll import Bucket, loss_by_position, new_cache, token_losses
from ..hf.attach import adapting_layers, runtime_of, unwrap, updates_off
from ..hf.context import fast_weights
from ..session.diagnostics import slow_weight
from ..text_files import Source
from .names import Names, attention_window, returning_names
from .text import Tokens

PIECE = 1024
"""Tokens read per call."""
CLEAR = 2.0
"""Number of standard errors from zero for a clear difference."""
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
        return self._between(edges)

    def chunks(self) -> list[tuple[Bucket, Bucket]]:
        return self._between(range(1, self.tokens + 1, self.chunk_size))

    def _between(self, starts: Sequence[int]) -> list[tuple[Bucket, Bucket]]:
        on, off = (loss_by_position(values[None], [*starts, self.tokens + 1]) for values in (self.on, self.off))
        return list(zip(on, off, strict=True))


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
    held, runtime = fast_weights(cache), runtime_of(model)
    projections = {site.index: site.projection() for site in runtime.sites}
    layers = []
    for info in adapting_layers(model):
        fast, weight = held[info.index], slow_weight(projections[info.index], info.shape)
        change = torch.zeros(info.shape) if fast.S is None else fast.S[0]
        norm = None if weight is None else relative_norm(change, weight, runtime.config.lr)
        layers.append(LayerUpdates(info.index, fast.updates[0], info.state_bytes, norm))
    return layers


@dataclass(frozen=True)
class DemoResult:
    """One file read by one model with updates on and off. ``names`` is None for a model that attends to everything."""

    model: str
    source: Source
    tokens: Tokens
    comparison: Comparison
    names: Names | None

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "no clear difference" with updates on, where updates had been made."""
        gain, error = self.comparison.gain()
        if error is None or abs(gain) < CLEAR * error or gain == 0:
            return "no clear difference"
        return "better" if gain > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, ready for JSON. Losses are in nats per token, positions count from 0."""
        c = self.comparison
        gain, error = c.gain()
        return {
            "file": str(self.source.path),
            "file_bytes": self.source.size,
            "model": self.model,
            "chunk_size": c.chunk_size,
            "tokens": c.tokens,
            "updates": c.updates,
            "loss": {"on": float(c.on.mean()), "off": float(c.off.mean())},
            "gain_after_first_update": {"mean": gain, "standard_error": error},
            "verdict": self.verdict,
            "by_position": _losses(c.buckets()),
            "by_chunk": _losses(c.chunks()),
            "names": None if self.names is None else asdict(self.names),
            "layers": [asdict(layer) for layer in c.layers],
            "state_bytes": sum(layer.state_bytes for layer in c.layers),
            "seconds": {"on": c.seconds_on, "off": c.seconds_off},
            "tokens_per_second": {"on": c.tokens / c.seconds_on, "off": c.tokens / c.seconds_off},
        }


def _losses(pairs: list[tuple[Bucket, Bucket]]) -> list[dict[str, Any]]:
    return [{"start": on.start, "end": on.end - 1, "on": on.loss, "off": off.loss} for on, off in pairs]


def run_demo(name: str, model: nn.Module, source: Source, tokens: Tokens, advance: Advance | None = None) -> DemoResult:
    """Read ``tokens`` with ``model`` (called ``name`` in the result) with updates on and off.

    UserError when a loss is not finite.
    """
    comparison = compare(model, tokens.ids, advance)
    for label, losses in (("on", comparison.on), ("off", comparison.off)):
        wrong = np.flatnonzero(~np.isfinite(losses))
        if len(wrong):
            where = f"its loss is not a number from token {wrong[0] + 1:,} on"
            raise UserError(f"{name} breaks down with updates {label}: {where}")
    config = unwrap(model).config
    window = attention_window(config)
    names = None
    if window is not None:
        names = returning_names(tokens, comparison.on, comparison.off, window, config.num_hidden_layers)
    return DemoResult(name, source, tokens, comparison, names)
