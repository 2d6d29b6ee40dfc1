"""Suites of measurements. A suite cuts its work into units that can be measured one by one, in any order.

Each suite is one module: ``from_options(options, texts, tokenizer, model)`` builds it from the command line;
``tables``, ``verdicts`` and ``figures`` (the last two if it has any) present its records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import UserError

if TYPE_CHECKING:
    from torch import nn

SUITES = ("nll", "needle", "mqar", "read-then-ask", "theory", "diagnostics", "harness", "ruler")
WITHOUT_TEXT = frozenset(["harness", "ruler"])
"""Suites that need no text."""

KINDS = ("single", "multi-key", "multi-value", "multi-query")
"""Kinds of needles."""

Record = dict[str, Any]
"""One row of figures, JSON-ready. Every record of a unit has ``document``, the cluster that intervals resample over."""

Tables = dict[str, list[dict[str, Any]]]
"""Rows of figures by the name of the table."""


@dataclass(frozen=True)
class Unit:
    """A piece of work: ``key`` names it for good (a run taken up again skips keys it has), ``tokens`` is its size."""

    key: str
    tokens: int


class Suite(Protocol):
    """One kind of measurement, over one and the same inputs for every model and setting."""

    name: str

    def units(self) -> Sequence[Unit]:
        """Return all units, the same ones in every run."""
        ...

    def measure(self, model: "nn.Module", unit: Unit) -> list[Record]:
        """Measure one unit, by the model as it is set at the moment (updates on or off, any settings)."""
        ...


def check_needles(kinds: Sequence[str], depths: Sequence[float], lengths: Sequence[int]) -> None:
    """Raise UserError for kinds, depths or lengths that suite needle does not know."""
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise UserError(f"no kind of needle {unknown[0]!r}, only {', '.join(KINDS)}")
    if min(lengths, default=0) < 1:
        raise UserError(f"lengths {list(lengths)}: at least one, each of 1 token or more")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths {list(depths)}: at least one, each from 0 to 1")


def module_of(suite: str) -> Any:
    """Import the module that defines a suite of ``SUITES``."""
    return import_module(f"{__name__}.{suite.replace('-', '_')}")
