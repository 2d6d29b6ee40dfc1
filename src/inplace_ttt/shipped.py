"""The trained model that comes with the package."""

from pathlib import Path

SHIPPED = "shipped"
"""How session files and options name it."""
DEFAULT_MODEL = Path(__file__).resolve().parent / "models" / "books-and-code"
"""Directory of a small model with fast weights, trained on books and on Python source (see docs/results.md)."""
