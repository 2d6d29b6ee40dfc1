"""The method on plain tensors: torch only, state explicit in and out, nothing here knows who called it."""

from . import rules_more as rules_more
from .algebra import outer
from .chunks import ChunkTable, document_ids
from .layer import complete, read
from .reference import ReferenceState, reference
from .rules import RULES, Rule, Sum, make_rule, register_rule
from .scan import PATHS, Call, Path, Result, scan
from .state import FastWeights
from .targets import TARGETS, Target, make_target, register_target
from .teaching import Lesson, Teacher

__all__ = [
    "PATHS", "RULES", "TARGETS", "Call", "ChunkTable", "FastWeights", "Lesson", "Path", "ReferenceState", "Result",
    "Rule", "Sum", "Target", "Teacher", "complete", "document_ids", "make_rule", "make_target", "outer", "read",
    "reference", "register_rule", "register_target", "scan",
]  # fmt: skip
