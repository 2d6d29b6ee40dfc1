"""The trained model that comes with the package."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = "shipped"
"""Name of the shipped model in session files and options."""
DEFAULT_MODEL = PACKAGE / "models" / "books-and-code"
"""Directory of a small model with fast weights, trained on books and on Python source (see docs/results.md)."""
