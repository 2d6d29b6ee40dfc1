"""Interface of a session for the modules that implement parts of it: generation, files, LoRA export."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from .diagnostics import Timeline
from .probe import Probe
from .results import Score, Stats
from .sources import Readable
from .stream import Reader, Stream
from .text import StreamEncoder


class SessionParts(Protocol):
    """The part of ``Session`` that these modules use. Its members are documented there."""

    tokenizer: Any
    origin: str | None
    _reader: Reader
    _stream: Stream
    _encoder: StreamEncoder | None
    _timeline: Timeline
    _probe: Probe

    @property
    def fast_weights(self) -> dict[int, Any]: ...

    @property
    def timeline(self) -> Timeline: ...

    def stats(self) -> Stats: ...

    def snapshot(self) -> Any: ...

    def restore(self, snapshot: Any) -> None: ...

    def commit(self) -> bool: ...

    def _exclusive(self) -> AbstractContextManager[None]: ...

    def _ids(self, source: Readable) -> Iterator[list[int]]: ...

    def _begin(self) -> list[int]: ...

    def _feed(self, ids: list[int], scored: bool, learn: bool = True) -> Iterator[tuple[int, list[float]]]: ...

    def _flush(self, scored: bool = False) -> Score: ...
