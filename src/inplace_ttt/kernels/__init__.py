"""Faster backends of ``core.scan`` and ``core.target``. ``core`` chooses them by device or by name.

``segments``: the scan as batched products over segments of chunks (plain PyTorch, any device).
``walk``: one pass that turns a segment's updates into the weights that its chunks see; in Triton for half precision.
``convolution``: the target's convolution in one kernel, forward and backward (Triton).
"""

from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton can be imported (it comes with PyTorch's CUDA builds)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True
