"""The method on plain tensors: torch only, state explicit in and out, nothing here knows who called it."""

from .chunks import ChunkTable, document_ids
from .reference import ReferenceState, reference
from .scan import scan
from .state import FastWeights
from .target import target

__all__ = ["ChunkTable", "FastWeights", "ReferenceState", "document_ids", "reference", "scan", "target"]
