"""Faster backends of ``core.scan`` and ``core.target``. ``core`` chooses them by device or by name.

``segments``: the scan as batched products over segments of chunks (plain PyTorch, any device).
``walk``: one pass that turns a segment's updates into the weights that its chunks see; in Triton for half precision.
``convolution``: the target's convolution in one kernel, forward and backward (Triton).
"""

from importlib.util import find_spec

_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Whether Triton is there (it comes with PyTorch's CUDA builds)."""
    return _TRITON
