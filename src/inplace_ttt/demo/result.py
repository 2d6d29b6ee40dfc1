"""The demo as a function from a text to figures."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from ..errors import UserError
from ..hf.attach import unwrap
from ..text_files import Source
from .compare import Advance, Comparison, compare
from .names import Names, attention_window, returning_names
from .text import Tokens

CLEAR = 2.0
"""Number of standard errors from zero for a clear difference."""


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
            "by_position": [
                {"start": on.start, "end": on.end - 1, "on": on.loss, "off": off.loss} for on, off in c.buckets()
            ],
            "by_chunk": c.by_chunk(),
            "names": None if self.names is None else asdict(self.names),
            "layers": [asdict(layer) for layer in c.layers],
            "state_bytes": sum(layer.state_bytes for layer in c.layers),
            "seconds": {"on": c.seconds_on, "off": c.seconds_off},
            "tokens_per_second": {"on": c.tokens / c.seconds_on, "off": c.tokens / c.seconds_off},
        }


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
