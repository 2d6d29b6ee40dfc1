"""Sampling of the next token by transformers' own logits processors, and stop strings."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import UserError


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. ``temperature`` 0 is greedy. Raises UserError on values out of range."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            if not ((value := getattr(self, name)) is None or _is(value, Integral)):
                raise UserError(f"{name} {value!r}: a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not (_is(value, Real) or (value is None and name in ("top_p", "min_p"))):
                raise UserError(f"{name} {value!r}: a number")
        checks = (
            (self.seed is None or -(2**63) <= self.seed < 2**64, f"seed {self.seed}: below 2**64"),
            (self.temperature >= 0, f"temperature {self.temperature}: 0 or more"),
            (self.top_k is None or self.top_k >= 1, f"top_k {self.top_k}: 1 or more"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p {self.top_p}: above 0, at most 1"),
            (self.min_p is None or 0 <= self.min_p <= 1, f"min_p {self.min_p}: between 0 and 1"),
            (self.repetition_penalty > 0, f"repetition_penalty {self.repetition_penalty}: above 0"),
        )
        for good, message in checks:
            if not good:
                raise UserError(message)

    def processors(self) -> LogitsProcessorList:
        """Return the logits processors in transformers' own order."""
        draws = self.temperature > 0
        table: tuple[tuple[Any, Any, Any], ...] = (
            (self.repetition_penalty != 1, RepetitionPenaltyLogitsProcessor, self.repetition_penalty),
            (draws and self.temperature != 1, TemperatureLogitsWarper, float(self.temperature)),
            (draws and self.top_k is not None, TopKLogitsWarper, self.top_k),
            (draws and self.top_p is not None and self.top_p < 1, TopPLogitsWarper, self.top_p),
            (draws and self.min_p, MinPLogitsWarper, self.min_p),
        )
        return LogitsProcessorList([kind(value) for is_on, kind, value in table if is_on])


class Sampler:
    """A sampler of single tokens. Draws on the CPU, so a seed means the same on every device."""

    def __init__(self, settings: Sampling) -> None:
        self.settings, self.processors = settings, settings.processors()
        self.generator = torch.Generator()
        if settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(settings.seed)

    @property
    def is_greedy(self) -> bool:
        """True where it always takes the most likely token."""
        return self.settings.temperature == 0 and not self.processors

    def __call__(self, recent: Sequence[int], logits: Tensor) -> int:
        """Return the next token after the ids ``recent`` (for the repetition penalty), from logits [V]."""
        if logits.isnan().any():
            raise UserError("the model's prediction is not a number: the updates ran away. Try a decay, or less lr")
        before: Any = torch.tensor([list(recent)], dtype=torch.int64)
        scores = self.processors(before, logits.float().cpu()[None])[0]
        if self.settings.temperature == 0:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))


class StopText:
    """A filter that ends text at the first stop string; a possible beginning of one is held back.

    Of several that end at the same character the longest counts, so how the text is split does not matter.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        if isinstance(stops, str):
            stops = (stops,)
        if not isinstance(stops, Sequence) or not all(isinstance(stop, str) for stop in stops):
            raise UserError(f"stop {stops!r}: a string, or a list of strings")
        self.stops, self.held, self.found = tuple(stops), "", False
        if not all(self.stops):
            raise UserError("a stop string is empty")

    def push(self, text: str) -> str:
        """Add text; return the text that is safe to show."""
        self.held += text
        places = [(at + len(stop), at) for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if places:
            _, at = min(places)
            self.found, shown, self.held = True, self.held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        shown, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return shown

    def flush(self) -> str:
        """Return the text that was held back for a stop string that did not come."""
        shown, self.held = self.held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Return length of the longest end of the held text that begins ``stop``."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
