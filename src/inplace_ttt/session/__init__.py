"""Streams with persistent fast weights: read anything, for as long as you like, in bounded memory."""

from .pool import SessionPool
from .session import Score, Session, Snapshot, Stats

__all__ = ["Score", "Session", "SessionPool", "Snapshot", "Stats"]
