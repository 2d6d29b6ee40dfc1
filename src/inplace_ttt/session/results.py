"""Results of scoring and of studying, and a session's statistics."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """``tokens`` [n]: ids of a text, BOS included; ``losses``: -log p in nats of each.

    A stream's first token has no context and so no loss: then ``losses`` has one entry less.
    """

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return nats per scored token; nan when there is none."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")


@dataclass(frozen=True)
class Stats:
    """Statistics of a session. ``bytes_*`` are memory held; ``pending`` tokens wait for their chunk to fill up."""

    tokens: int
    written: int
    held_characters: int
    updates: int
    pending: int
    in_context: int
    bytes_context: int
    bytes_fast_weights: int
    window: int
    sinks: int
    settings: dict[str, Any]
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Studied:
    """Result of a study. ``questions``: the model's own that were learned; ``losses``: of each update, nats a token."""

    sentences: int
    questions: int
    losses: tuple[float, ...]

    @property
    def updates(self) -> int:
        """Updates of the fast weights."""
        return len(self.losses)
