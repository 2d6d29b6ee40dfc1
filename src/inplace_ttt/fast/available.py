"""Checks for optional packages."""

from importlib.util import find_spec

_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Tell if Triton is installed (it comes with PyTorch's CUDA builds)."""
    return _TRITON
