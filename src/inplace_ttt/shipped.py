"""What comes with the package: a trained model."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SHIPPED = "shipped"
"""How session files and options name it."""
DEFAULT_MODEL = PACKAGE / "models" / "books-and-code"
"""Directory of a small model with fast weights, trained on books and on Python source (see docs/results.md)."""
