"""Diagnostics of the fast weights: measured now or over time, with a warning when updates hurt."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import InPlaceTTTConfig
from ..core import FastWeights
from ..core.algebra import state_dtype
from ..core.diagnostics import LayerDiagnostics, effective_rank, key_overlap, output_change, relative_norm, update_norm
from ..hf.attach import adapting_layers, runtime_of
from ..hf.linear import dense_weight, is_dense

SAMPLES = 256
"""Maximum number of samples in a timeline."""
PROBES, NOISE_PROBES = (4, 8, 16, 32), 64
"""``harm`` looks at the last 4, 8, 16 or 32 probes, and takes their noise from the last 64."""
WORTH_SAYING = 0.005
"""nats per token."""


# -- one measurement ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: nn.Module, fast: Mapping[int, FastWeights], row: int = 0, config: InPlaceTTTConfig | None = None
) -> list[LayerDiagnostics]:
    """Return one row's diagnostics of every adapting layer in ``fast`` (``inplace_ttt.fast_weights(cache)``), by layer.

    The sample of keys is the last completed chunk as ``FastWeights.history`` keeps it: its overlap and its output
    change are taken with S as it was before that chunk's own update (None where a truncation to a rank has mixed the
    two). ``config``: the settings that the cache was read with; None: the model's present ones. A LoRA adapter's part
    of W0 is not counted. Cost: two decompositions of S a layer, core/diagnostics.py.
    """
    runtime = runtime_of(model)
    settings = runtime.config if config is None else config
    shapes = {info.index: info.shape for info in adapting_layers(model)}
    return [
        _measure_layer(site.index, site.projection(), fast[site.index], row, settings, shapes[site.index])
        for site in runtime.sites
        if site.index in fast
    ]


def _measure_layer(
    index: int, module: Any, fast: FastWeights, row: int, config: InPlaceTTTConfig, shape: tuple[int, int]
) -> LayerDiagnostics:
    weight, lr = slow_weight(module, shape), config.lr
    S_BDF = fast.dense() if fast.rule.linear else None
    S = torch.zeros(shape) if S_BDF is None else S_BDF[row]
    change = overlap = added = clipped = None
    if fast.history and fast.kept[row] and fast.rule.linear:
        z = fast.last_chunk(row)["z"][0]
        # Before a first update S is zero, and the difference would be rounding.
        state = fast.before(row) if fast.updates[row] > 1 else {"S": torch.zeros_like(S)[None]}
        if state is not None:
            before = state["S"][0]
            overlap = key_overlap(before, z)
            change = None if weight is None else output_change(before, weight, z, lr)
        if fast.rule.outer and "v" in fast.history:
            norm = update_norm(fast.last_chunk(row)["v"][0].to(z.dtype), z)
            size = None if weight is None else float(torch.linalg.vector_norm(weight, dtype=state_dtype(weight.dtype)))
            unit = size if config.clip_relative else 1.0
            clipped = None if config.clip is None or unit is None else norm >= 0.99 * config.clip * unit
            added = abs(lr) * norm / size if size else None
    return LayerDiagnostics(
        layer=index,
        updates=fast.updates[row],
        tokens=fast.seen[row],
        relative_norm=None if weight is None else _finite(relative_norm(S, weight, lr)),
        output_change=_finite(change),
        effective_rank=_finite(effective_rank(S)),
        largest_rank=min(shape),
        key_overlap=_finite(overlap),
        update_norm=_finite(added),
        clipped=clipped,
    )


def slow_weight(module: Any, shape: tuple[int, int]) -> Tensor | None:
    """Return W0 [D, F]; None where it is quantised."""
    weight = dense_weight(module).detach() if is_dense(module.weight) else None
    return None if weight is None or tuple(weight.shape) != shape else weight


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# -- over time ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A measurement after ``tokens`` tokens. Losses in nats per token, of the same tokens; off None: not probed."""

    tokens: int
    layers: list[LayerDiagnostics]
    loss_on: float
    loss_off: float | None


class Timeline:
    """Samples of one reading. Memory is bounded: beyond ``limit`` of them every second one goes and ``every`` doubles.

    Of two neighbours the one with both losses stays, else the earlier; the newest stays in any case.
    """

    def __init__(self, every: int = 2048, limit: int = SAMPLES) -> None:
        self.every, self.limit = every, limit
        self.samples: list[Sample] = []

    def due(self, tokens: int) -> bool:
        """Return whether a sample should be taken after ``tokens`` tokens."""
        return tokens >= self.next

    @property
    def next(self) -> int:
        """Tokens read when the next sample is wanted."""
        return (self.samples[-1].tokens if self.samples else 0) + self.every

    def copy(self) -> "Timeline":
        """Return an independent timeline with the same samples."""
        twin = copy.copy(self)
        twin.samples = list(self.samples)
        return twin

    def append(
        self, tokens: int, layers: Iterable[LayerDiagnostics], loss_on: float, loss_off: float | None = None
    ) -> None:
        """Add a sample taken after ``tokens`` tokens in all. Raises ValueError unless they are more than before."""
        if self.samples and tokens <= self.samples[-1].tokens:
            raise ValueError(f"samples come in order: {tokens} tokens after {self.samples[-1].tokens}")
        self.samples.append(Sample(tokens, list(layers), loss_on, loss_off))
        if len(self.samples) > self.limit:
            *old, newest = self.samples
            pairs = [old[i : i + 2] for i in range(0, len(old), 2)]
            self.samples = [next((s for s in pair if s.loss_off is not None), pair[0]) for pair in pairs] + [newest]
            self.every *= 2

    # -- for plotting ---------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> np.ndarray:
        """Tokens read, by sample."""
        return np.array([s.tokens for s in self.samples])

    @property
    def loss_on(self) -> np.ndarray:
        """By sample; NaN where not finite."""
        return _floats(s.loss_on for s in self.samples)

    @property
    def loss_off(self) -> np.ndarray:
        """By sample; NaN where not probed."""
        return _floats(s.loss_off for s in self.samples)

    @property
    def gain(self) -> np.ndarray:
        """off - on, by sample: positive where updates help."""
        gain: np.ndarray = self.loss_off - self.loss_on
        return gain

    @property
    def layers(self) -> list[int]:
        """Layers measured, ascending."""
        return sorted({d.layer for s in self.samples for d in s.layers})

    def clipped_share(self, layer: int) -> float | None:
        """Return the share of a layer's sampled chunks whose update was clipped; None when no clip is set."""
        known = [d.clipped for s in self.samples for d in s.layers if d.layer == layer and d.clipped is not None]
        return sum(known) / len(known) if known else None

    def series(self, name: str, layer: int) -> np.ndarray:
        """Return a layer's field ``name``, by sample; NaN where unknown."""
        found = ([d for d in s.layers if d.layer == layer] for s in self.samples)
        return _floats(getattr(here[0], name) if here else None for here in found)

    # -- as JSON --------------------------------------------------------------------------------------------------

    def to_list(self) -> list[dict[str, Any]]:
        """Return a JSON-ready list, one entry per sample; non-finite numbers become None."""
        losses = ("loss_on", "loss_off")
        return [asdict(s) | {name: _finite(getattr(s, name)) for name in losses} for s in self.samples]

    @classmethod
    def from_list(cls, entries: Sequence[Mapping[str, Any]], every: int = 2048, limit: int = SAMPLES) -> "Timeline":
        """Build a timeline from the result of ``to_list``; the current interval, ``every``, is not stored."""
        timeline = cls(every, limit)
        for entry in entries:
            layers, on = (LayerDiagnostics(**values) for values in entry["layers"]), entry["loss_on"]
            timeline.append(entry["tokens"], layers, math.nan if on is None else on, entry["loss_off"])
        return timeline


def _floats(values: Iterable[float | None]) -> np.ndarray:
    array = np.array([math.nan if x is None else x for x in values], np.float64)
    return np.where(np.isfinite(array), array, math.nan)


# -- harm --------------------------------------------------------------------------------------------------------------


def harm(timeline: Timeline, settings: Mapping[str, Any] | None = None) -> str | None:
    """Return a line that warns that updates hurt, or None.

    Over the last 4, 8, 16 or 32 probes (samples with both losses), loss_on - loss_off must be above ``WORTH_SAYING`` on
    average and by ``4.5 + 12 / (n - 3)`` standard errors, n the probes seen. The noise of one probe comes from the
    differences of neighbours, so growing harm does not hide itself. So many standard errors because each new probe is
    another test: of simulated readings of 256 probes without gain or harm 1% raise an alarm (2% with heavy tails); with
    2 standard errors almost all would. Losses or fast weights that are not finite raise one, too.

    "Since": where the sum of all later differences is largest. ``settings`` (``inplace_ttt.fast_settings(model)``) lets
    the advice name values.
    """
    if not timeline.samples:
        return None
    latest = timeline.samples[-1]
    broken = [d.layer for d in latest.layers if d.effective_rank is None]
    if broken or not math.isfinite(latest.loss_on):
        what = f"the fast weights of layer {broken[0]} are" if broken else "the loss with updates on is"
        return f"Updates hurt: after {latest.tokens:,} tokens {what} not finite. {_advice(latest, settings)}"
    probed = ~np.isnan(timeline.gain)
    worse, tokens = -timeline.gain[probed], timeline.tokens[probed]
    recent = worse[-NOISE_PROBES:]
    if len(recent) < PROBES[0]:
        return None
    noise = math.sqrt(np.square(np.diff(recent)).mean() / 2)
    errors = 4.5 + 12 / (len(recent) - 3)
    means = {n: float(recent[-n:].mean()) for n in PROBES if n <= len(recent)}
    found = [n for n, mean in means.items() if mean > max(WORTH_SAYING, errors * noise / math.sqrt(n))]
    if not found or means[PROBES[0]] <= WORTH_SAYING:  # no harm at present
        return None
    n, error = max(found), noise / math.sqrt(max(found))
    since = tokens[np.argmax(worse[::-1].cumsum()[::-1])]
    return (
        f"Updates hurt: over the last {n} probes the loss with them is {means[n]:.3f} nats per token higher (standard "
        f"error {error:.3f}), since about token {since:,}{_state_in_words(latest)}. {_advice(latest, settings)}"
    )


def _state_in_words(sample: Sample) -> str:
    """Describe the layer that changed most."""
    known = [d for d in sample.layers if d.relative_norm is not None and d.effective_rank is not None]
    if not known:
        return ""
    d = max(known, key=lambda d: d.relative_norm or 0.0)
    overlap = "" if d.key_overlap is None else f", key overlap {d.key_overlap:.2f}"
    return (
        f"; layer {d.layer} changed most, by {d.relative_norm:.2g} of its weight (effective rank "
        f"{d.effective_rank:.0f} of {d.largest_rank}{overlap})"
    )


def _advice(sample: Sample, settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return "Try a decay (0.01, say), half the lr, a clip, or a reset."
    lr, decay, clip, size = settings["lr"], settings["decay"], settings["clip"], settings.get("update_size")
    tries = [f"decay={min(2 * decay, 0.5) or 0.01:.3g} (now {decay:.3g})"]
    updates = [d.update_norm for d in sample.layers if d.update_norm]
    if size == "auto":
        pass
    elif size is not None:
        tries += [f"update_size={size / 2:.2g} (now {size:.2g})", 'update_size="auto"']
    else:
        tries.append(f"lr={lr / 2:.3g} (now {lr:.3g})")
        if clip is not None:
            tries.append(f"clip={clip / 2:.2g} (now {clip:.2g})")
        elif updates and lr:
            half = float(np.median(updates)) / abs(lr) / 2
            tries.append(f"clip={half:.2g} with clip_relative=True (half of the last update)")
    return f"Try {', '.join(tries)}, or a reset."
