"""An inner learning rate from measured sizes, so that one setting fits both targets, any width and any chunk size.

The target's source u has unit RMS for ``hidden_states`` and about 0.02 for ``input_embed``, and an update sums over a
chunk, so a good eta for one model is far off for another. What carries over is the size of one chunk's update relative
to the weight that it changes, eta ||dW||_F / ||W0||_F. At the start kappa = 0 and so dW = 0: the probe measures with
the average of the taps in kappa's place (every tap 1/K) and P as it is. The result is a plain ``lr``.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inplace_ttt.core.diagnostics import update_norm
from inplace_ttt.core.target import chunked, target
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import runtime_of


def update_sizes(model: nn.Module, row: Mapping[str, Tensor], *, probe: bool = False) -> dict[int, float]:
    """``||dW||_F / ||W0||_F`` of one chunk by layer, without eta: the median over the chunks of ``row``.

    ``row``: ``input_ids`` and ``position_ids`` [1, T]. ``probe`` takes the average tap for kappa. One forward without
    gradients; the model stays as it is. UserError when no chunk of the row completes.
    """
    runtime = runtime_of(model)
    sizes: dict[int, list[float]] = {}

    def listener(site: Any) -> Any:
        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            table, z = site.context.table_on(arguments[0].device), arguments[0]
            if not table.updates:
                return
            conv, proj = getattr(site.mlp, "ttt_conv", None), getattr(site.mlp, "ttt_proj", None)
            kappa = None if conv is None else conv.weight[:, 0].float()
            if probe and kappa is not None:
                kappa = torch.full_like(kappa, 1 / kappa.shape[1])
            v = target(
                site._source(site.context).float(),
                kappa,
                None if proj is None else proj.weight.float(),
                table,
                lookahead=runtime.config.lookahead,
            )
            assert v is not None
            C, weight = table.chunk_size, float(torch.linalg.vector_norm(module.weight.float()))
            keys = chunked(z.float(), None, table)
            complete = [True] * table.updates if table.update is None else table.update[0, : table.updates].tolist()
            for i, whole in enumerate(complete):
                if whole:
                    part = slice(i * C, (i + 1) * C)
                    sizes.setdefault(site.index, []).append(update_norm(v[0, part], keys[0, part]) / weight)

        return before

    handles = [site.projection().register_forward_pre_hook(listener(site)) for site in runtime.sites]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(**{n: row[n].to(device) for n in ("input_ids", "position_ids") if n in row}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not sizes:
        raise UserError("ttt_relative_update: no chunk completes in the first row: make ttt.chunk_size smaller")
    return {layer: statistics.median(found) for layer, found in sorted(sizes.items())}


def fitting_lr(model: nn.Module, row: Mapping[str, Tensor], relative_update: float) -> float:
    """eta for which the probe's update is ``relative_update`` of the slow weight: the geometric mean over layers.

    Two digits are kept, so that rounding on another machine does not change it.
    """
    sizes = [size for size in update_sizes(model, row, probe=True).values() if size > 0]
    if not sizes:
        raise UserError("ttt_relative_update: the probe's updates are zero: set ttt.lr instead")
    return float(f"{relative_update / math.exp(statistics.fmean(map(math.log, sizes))):.1e}")
