"""Fast paths for rules that allow them. Importing this package registers them (``core.scan.PATHS``).

``outer``: outer rules as one operator, forward and backward. ``segments``: that in batched products over segments
of chunks; ``walk``: one pass that computes the weights a segment's chunks see (Triton for half precision).
``convolution``: the target's convolution in one kernel. ``factors``: S as pairs or factors of rank r. ``decoding``: one
token at a time. ``ranks``: rows that are split over processes.
"""

import torch
from torch import Tensor

from ..core import targets
from .outer import scan
from .walk import has_triton

__all__ = ["has_triton", "scan"]


def _fused_convolution(u: Tensor, kappa: Tensor, C: int, lookahead: int, dtype: torch.dtype) -> Tensor | None:
    """Run the convolution as one Triton kernel: on CUDA, below float64."""
    if not u.is_cuda or torch.float64 in (u.dtype, kappa.dtype) or not has_triton():
        return None
    from .convolution import convolve

    return convolve(u, kappa, C, lookahead, dtype)


targets.FUSED.append(_fused_convolution)
