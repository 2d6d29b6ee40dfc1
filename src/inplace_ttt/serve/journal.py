"""Operations on a session as entries of its journal: done when they come in, done again after a restart.

An entry is written to disk before it is done, so a process that is killed loses nothing that it has begun. What was
written by the model is noted afterwards, chunk by chunk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..session import Session
from ..session.writing import read_exactly, replay

REMEMBERED = 1000
"""Messages of a conversation that a session knows it has read, at most."""
IDS = 512
"""Token ids read in one piece."""


@dataclass
class Prompt:
    """A text to be read before an answer, or ids (``exact``: without BOS), and digests of new messages.

    What is not to be learned is ids.
    """

    text: str | None = None
    ids: list[int] | None = None
    exact: bool = False
    messages: list[str] = field(default_factory=list)
    learn: bool = True

    def entry(self) -> dict[str, Any]:
        return {"op": "prompt", **self.__dict__}


def pieces_of(entry: dict[str, Any], session: Session, piece: int) -> Iterator[Callable[[], Any]]:
    """Yield an entry's work on a session, in pieces of bounded time. ``piece``: characters read in one."""
    op = entry["op"]
    if op == "reset":
        yield session.reset
    elif op == "wrote":
        ids = entry["ids"]
        for at in range(0, max(len(ids), 1), IDS):
            yield lambda at=at: replay(session, ids[at : at + IDS], entry.get("learn"))  # type: ignore[misc]
    elif entry.get("text") is not None:
        text = entry["text"]
        for at in range(0, len(text), piece):
            yield lambda at=at: session.read(text[at : at + piece])  # type: ignore[misc]
    elif entry.get("ids") is not None:
        ids, learn = entry["ids"], entry.get("learn", True)
        for at in range(0, len(ids), IDS):
            begins = at == 0 and not entry.get("exact")
            yield lambda part=ids[at : at + IDS], begins=begins: (  # type: ignore[misc]
                read_exactly(session, part, learn, begins)
            )


def message_digest(role: str, content: str) -> str:
    """Return what a session remembers of a message."""
    return hashlib.sha256(json.dumps([role, content]).encode()).hexdigest()[:24]


def known(history: list[str], digests: list[str]) -> int:
    """Count the messages at the beginning of a request that the session has read already.

    Clients send the whole conversation, its last part, or the new message alone: the longest end of what was read
    that begins the request is left out.
    """
    longest = min(len(history), len(digests))
    return next((n for n in range(longest, 0, -1) if history[-n:] == digests[:n]), 0)
