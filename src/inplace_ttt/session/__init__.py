"""Streams with persistent fast weights: text of any length in bounded memory."""

from .pool import SessionPool
from .session import Session
from .state import Score, Snapshot, Stats

__all__ = ["Score", "Session", "SessionPool", "Snapshot", "Stats"]
