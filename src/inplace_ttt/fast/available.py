"""What is installed here."""

from importlib.util import find_spec

_TRITON = find_spec("triton") is not None


def has_triton() -> bool:
    """Tell whether Triton is there (it comes with PyTorch's CUDA builds)."""
    return _TRITON
