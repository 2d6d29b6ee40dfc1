"""Limits of a server with their defaults, and the errors it answers with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError

LEARN = {"all": (True, True), "read": (True, False), "written": (False, True), "none": (False, False)}
"""Settings of what a session learns: what it reads, what it writes. The rest is in its context only."""
LEARN_CHOICES = f"one of {', '.join(LEARN)} or frozen"


@dataclass(frozen=True)
class Limits:
    """Bounds on what one server takes. Sizes in bytes, times in seconds."""

    batch: int = 32
    """Sessions that write in one step; more wait for their turn."""
    queue: int = 64
    """Requests that wait or run besides, at most; then 429."""
    patience: float = 30.0
    """Longest wait for memory before a request is answered with 429."""
    memory: int | None = None
    """Bytes of all sessions in memory; idle ones beyond that go to disk. None: a quarter of what is free at start."""
    sessions: int = 100
    """Sessions of one owner, on disk included."""
    body: int = 16 << 20
    """Largest request body; an uploaded text or session file counts."""
    prompt: int = 100_000
    """Most tokens of one prompt. Longer texts are read into a session, in pieces."""
    new_tokens: int = 4096
    """Most tokens of one answer, and what a chat answer has when the request does not say."""
    choices: int = 8
    """Most answers to one request."""
    rate: int = 600
    """Requests of one owner per minute."""
    piece: int = 2048
    """Characters read between two decode steps of those who write."""
    unsaved: int = 16_384
    """Tokens after which a session's state is stored, so that a restart need not read more than these again."""
    slow: float = 30.0
    """Longest pause of a client that sends a request or takes an answer; then it is cut off."""
    grace: float = 20.0
    """Time that running requests get to finish when the server stops."""


def given_settings(objective: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a plain model's fast weights that are given. UserError where an objective is not."""
    given = {key: value for key, value in settings.items() if value is not None}
    if objective is None and given:
        raise UserError(f"{', '.join(given)}: for a plain model only, which needs an objective too")
    return given


class ServeError(Exception):
    """An answer that is not 200: ``status``, a message for the client, and OpenAI's ``type`` and ``code``."""

    status: int = 400
    kind: str = "invalid_request_error"
    code: str | None = None
    headers: dict[str, str] = {}  # noqa: RUF012 (never written to)

    def __init__(self, message: str, **values: Any) -> None:
        super().__init__(message)
        for name, value in values.items():
            setattr(self, name, value)

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}


class NotFoundError(ServeError):
    """No such session (of this owner), model or route."""

    status, code = 404, "not_found"


class VersionError(ServeError):
    """The session is not at the version that the request expects, or its state does not fit this server."""

    status, code = 409, "conflict"


class BusyError(ServeError):
    """A lack of room that will pass: try again later."""

    status, kind, code = 429, "rate_limit_error", "busy"

    def __init__(self, message: str, after: float = 1.0) -> None:
        super().__init__(message, headers={"retry-after": str(max(1, round(after)))})


class InternalError(ServeError):
    """A bug, of which a client is told nothing else."""

    status, kind = 500, "server_error"

    def __init__(self) -> None:
        super().__init__("something failed inside the server; its log says more")


class StoppingError(ServeError):
    """The server is stopping."""

    status, kind, code = 503, "server_error", "stopping"

    def __init__(self) -> None:
        super().__init__("the server is stopping: try again", headers={"retry-after": "5"})
