"""Suite ``diagnostics``: what the fast weights are like after each window that ``nll`` measures."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from ...hf.attach import unwrap
from ...hf.cache import cache_name
from ...hf.context import fast_weights
from ...session.diagnostics import measure
from . import Record, Unit
from .nll import NllSuite, evaluating, piece_size


class StateSuite:
    """Reads the windows of an ``NllSuite`` and measures the fast weights at their end, layer by layer."""

    name = "diagnostics"
    needs_updates = True

    def __init__(self, nll: NllSuite) -> None:
        self.nll = nll

    def units(self) -> Sequence[Unit]:
        """The windows, by the same keys as in ``nll``."""
        return [unit for unit in self.nll.units() if unit.key.startswith("window/")]

    def measure(self, model: nn.Module, unit: Unit) -> list[Record]:
        """One record per layer: the fields of ``LayerDiagnostics``."""
        document, start, end, _ = self.nll._work[unit.key]
        ids = document.ids[start:end]
        root = unwrap(model)
        cache = DynamicCache(config=root.config)
        rows = torch.from_numpy(ids.astype("int64"))[None].to(next(model.parameters()).device)
        with evaluating(model):
            piece = piece_size(model, self.nll.piece)
            for at in range(0, rows.shape[1], piece):
                part = rows[:, at : at + piece]
                model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_name(root): cache})
        layers = measure(model, fast_weights(cache))
        return [{"document": document.name, "domain": document.domain, **asdict(layer)} for layer in layers]
