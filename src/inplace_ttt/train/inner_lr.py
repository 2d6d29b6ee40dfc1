"""An inner learning rate from measured sizes, so that one setting fits both targets, any width and any chunk size.

The target's source u has unit RMS for ``hidden_states`` and about 0.02 for ``input_embed``, and an update sums over a
chunk, so a good eta for one model is far off for another. What carries over is the size of one chunk's update relative
to the weight that it changes, eta ||dW||_F / ||W0||_F. At the start kappa = 0 and so dW = 0: the probe measures with
the average of the taps in kappa's place (every tap 1/K) and P as it is. The result is a plain ``lr``.
"""

import math
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inplace_ttt.errors import UserError
from inplace_ttt.train.sizes import measuring


def update_sizes(model: nn.Module, row: Mapping[str, Tensor], *, probe: bool = False) -> dict[int, float]:
    """``||dW||_F / ||W0||_F`` of one chunk by layer, without eta: the median over the chunks of ``row``.

    ``row``: ``input_ids`` and ``position_ids`` [1, T]. ``probe`` takes the average tap where kappa is zero. One
    forward without gradients; the model stays as it is. UserError when no chunk of the row completes.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), measuring(model, probe=probe, states=False) as sizes:
        given = {n: row[n].to(device) for n in ("input_ids", "position_ids") if n in row}
        model(**given, use_cache=False, logits_to_keep=1)
    if not sizes:
        raise UserError("ttt_relative_update: no chunk completes in the first row: make ttt.chunk_size smaller")
    return {layer: statistics.median(found.updates.tolist()) for layer, found in sorted(sizes.items())}


def fitting_lr(model: nn.Module, row: Mapping[str, Tensor], relative_update: float) -> float:
    """eta for which the probe's update is ``relative_update`` of the slow weight: the geometric mean over layers.

    Two digits are kept, so that rounding on another machine does not change it.
    """
    sizes = [size for size in update_sizes(model, row, probe=True).values() if size > 0]
    if not sizes:
        raise UserError("ttt_relative_update: the probe's updates are zero: set ttt.lr instead")
    return float(f"{relative_update / math.exp(statistics.fmean(map(math.log, sizes))):.1e}")
