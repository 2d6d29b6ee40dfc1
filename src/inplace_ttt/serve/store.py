"""The durable side of sessions: a journal of what was done to each, numbered without gaps, and states in between.

A session's version is the number of its last journal entry. Entry n + 1 is created under its own name, exclusively, so
of two who saw version n one succeeds (compare and set). A state holds all entries up to its version; a session is its
newest state and the entries after it. Whoever is killed at any moment leaves whole entries and whole states.

Names from outside never become names of files: those are hashes.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import ExistsError, LocalFiles, RemoteFiles

KEPT_ENTRIES = 64
"""Entries that stay when a newer state covers them: one who is that far behind still notices that he is."""
KEPT_STATES = 4
"""Saved states of a session that can be come back to, at most; older ones go."""


class ConflictError(Exception):
    """An error: somebody else changed the session first."""


@dataclass
class State:
    """A stored state: the blob that holds the session, and what is known besides."""

    version: int
    blob: str
    values: dict[str, Any]


@dataclass
class StoredSession:
    """A stored session: its newest state (None: it begins empty), the later entries, and versions to come back to."""

    version: int
    state: State | None
    entries: list[dict[str, Any]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)


def digest(text: str) -> str:
    """Return a name that is safe as a file's name and says nothing."""
    return hashlib.sha256(text.encode()).hexdigest()[:40]


class Store:
    """Sessions of owners. Keys are "OWNER/SESSION", both hashed."""

    def __init__(self, files: LocalFiles | RemoteFiles) -> None:
        self.files = files

    @staticmethod
    def key(owner: str, name: str) -> str:
        return f"{digest(owner)}/{digest(name)}"

    def create(self, owner: str, name: str, values: dict[str, Any]) -> str:
        """Make a session at version 0 and return its key. Raises ConflictError when there is one of this name."""
        key = self.key(owner, name)
        try:
            self.files.create(f"{key}/{_entry(0)}", json.dumps({"id": name, **values}).encode())
        except ExistsError:
            raise ConflictError(f"there is a session {name} already") from None
        return key

    def about(self, key: str) -> dict[str, Any] | None:
        """Return what ``create`` was told, or None when there is no such session."""
        try:
            found: dict[str, Any] = json.loads(self.files.read(f"{key}/{_entry(0)}"))
        except FileNotFoundError:
            return None
        return found

    def of_owner(self, owner: str) -> list[tuple[str, dict[str, Any]]]:
        """List the keys of an owner's sessions and what ``create`` was told, oldest first."""
        folder = digest(owner)
        found = [(key, about) for name in self.files.names(folder) if (about := self.about(key := f"{folder}/{name}"))]
        return sorted(found, key=lambda pair: (pair[1].get("created", 0), pair[1]["id"]))

    def count(self, owner: str) -> int:
        return len(self.files.names(digest(owner)))

    def version(self, key: str) -> int | None:
        """Return the newest version; None when there is no such session."""
        names = self.files.names(key)
        return max((_number(name) for name in names if name.endswith(".json")), default=0) if names else None

    def append(self, key: str, version: int, entry: dict[str, Any]) -> None:
        """Add the entry that makes ``version`` of the version before it; on disk when this returns.

        Raises ConflictError when the newest version is another one.
        """
        if self.version(key) != version - 1:
            raise ConflictError("this session was changed meanwhile")
        try:
            self.files.create(f"{key}/{_entry(version)}", json.dumps(entry).encode())
        except ExistsError:
            raise ConflictError("this session was changed meanwhile") from None

    def record(self, key: str) -> StoredSession | None:
        names = self.files.names(key)
        if not names:
            return None
        numbers = sorted(_number(name) for name in names if name.startswith("entry"))
        states = [name for name in sorted(names) if name.startswith("state") and name.endswith(".json")]
        newest = self._state(key, states[-1]) if states else None
        after = newest.version if newest else 0
        entries = [json.loads(self.files.read(f"{key}/{_entry(n)}")) for n in numbers if n > after]
        return StoredSession(max([after, *numbers]), newest, entries, self._saved(names))

    def state(self, key: str, version: int) -> State:
        """Return the stored state of a version. Raises FileNotFoundError."""
        return self._state(key, _named("state", version))

    def add_state(self, key: str, version: int, write: Callable[[Path], None], values: dict[str, Any]) -> None:
        """Store a state of ``version``, which ``write`` writes to a path, and drop what it makes superfluous."""
        stem = _named("state", version).removesuffix(".json")
        blob = f"{key}/{stem}-{secrets.token_hex(4)}.session"
        self.files.put(blob, write)
        try:
            self.files.create(f"{key}/{stem}.json", json.dumps({"blob": blob, **values}).encode())
        except ExistsError:  # the same version has the same content
            self.files.remove(blob)
        self._clean(key)

    def mark_saved(self, key: str, version: int) -> None:
        """Let the stored state of ``version`` stay, to come back to."""
        with suppress(ExistsError):
            self.files.create(f"{key}/{_named('saved', version)}", b"{}")
        self._clean(key)

    @contextmanager
    def opened(self, state: State) -> Iterator[Path]:
        with self.files.local(state.blob) as path:
            yield path

    def delete(self, key: str) -> None:
        self.files.remove(f"{key}/{_entry(0)}")  # from here on nobody finds it
        self.files.remove(key)

    def _state(self, key: str, name: str) -> State:
        values = json.loads(self.files.read(f"{key}/{name}"))
        return State(_number(name), values.pop("blob"), values)

    def _saved(self, names: list[str]) -> list[int]:
        return sorted(_number(name) for name in names if name.startswith("saved"))

    def _clean(self, key: str) -> None:
        names = self.files.names(key)
        newest = max(_number(name) for name in names if name.startswith("state") and name.endswith(".json"))
        saved = self._saved(names)
        kept = {*saved[-KEPT_STATES:], newest}
        for name in names:
            kind, number = name.split("-")[0], _number(name)
            old_state = kind in ("state", "saved") and number < newest and number not in kept
            if old_state or (kind == "entry" and 0 < number <= newest - KEPT_ENTRIES):
                self.files.remove(f"{key}/{name}")
        self.files.sweep(key)


def _named(kind: str, number: int, ending: str = "json") -> str:
    return f"{kind}-{number:012d}.{ending}"


def _entry(number: int) -> str:
    return _named("entry", number)


def _number(name: str) -> int:
    return int(name.split("-")[1].split(".")[0])
