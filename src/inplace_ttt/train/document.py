"""A document to train on."""

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Document:
    """One text. ``source`` says where it came from, ``licence`` under which terms ("" if unknown)."""

    id: str
    text: str
    source: str
    licence: str = ""
