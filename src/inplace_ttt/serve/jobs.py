"""Work that was begun for a request, and lives on apart from it: a client that leaves does not break it off midway."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from .scheduler import Scheduler, Writing


class Job:
    """A piece of work on the event loop. It tells what happens through events and ends with a result or an error.

    ``stop`` asks it to end early, between two pieces of work; it then ends in order, with what was done so far.
    """

    def __init__(self, scheduler: Scheduler, work: Callable[["Job"], Awaitable[Any]]) -> None:
        self._scheduler = scheduler
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self._writings: list[Writing] = []
        self.begun = asyncio.Event()
        """Set at the first event, or the end."""
        self.stopped = False
        self.task = asyncio.create_task(self._run(work))

    async def _run(self, work: Callable[["Job"], Awaitable[Any]]) -> Any:
        try:
            return await work(self)
        finally:
            self.emit(None)

    def emit(self, event: Any) -> None:
        """Tell the client something; None: that it has ended."""
        self._events.put_nowait(event)
        self.begun.set()

    @property
    def failed(self) -> bool:
        """Return whether it ended with an error before it told anything."""
        return self._events.qsize() == 1 and self.task.done() and self.task.exception() is not None

    def follow(self, writing: Writing) -> Writing:
        """End a writing, too, when the job is stopped."""
        self._writings.append(writing)
        if self.stopped:
            self._scheduler.cancel(writing)
        return writing

    def stop(self) -> None:
        self.stopped = True
        for writing in self._writings:
            self._scheduler.cancel(writing)

    async def events(self) -> AsyncIterator[Any]:
        """Yield everything the job tells, up to its end; then raise what it raised."""
        while (event := await self._events.get()) is not None:
            yield event
        await self.result()

    async def result(self) -> Any:
        """Return what the job returns. Cancelling the wait does not cancel the job."""
        return await asyncio.shield(self.task)
