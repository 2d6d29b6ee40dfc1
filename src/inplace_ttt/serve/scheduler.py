"""The one thread that calls the model: decode steps of all who write, and between two of them a piece of reading.

So whoever writes waits for a piece of somebody else's reading at most (and small things, which take next to no time),
however long the text, and whoever reads for one decode step a piece. Both kinds of work are first come, first served.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from time import perf_counter
from typing import Any

from ..session import Session, SessionPool
from ..session.writing import Writer
from .settings import StoppingError

SMALL = 0.02
"""Seconds for work between two decode steps: pieces are begun within it, so at most the last one takes longer."""


class Writing:
    """A session that writes, seen from the event loop: ``events`` gives (piece, ids, logprobs) and then a Finish."""

    def __init__(self, session: Session, look: Callable[[Writer], Any] | None, options: dict[str, Any]) -> None:
        self.session, self.look, self.options = session, look, options
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.writer: Writer | None = None
        self.stopped = False
        self.seen = 0
        self.looked: Any = None


class Finish:
    """The last event: ``reason`` is "stop", "length", "cancelled" or "error" (with ``error``)."""

    def __init__(self, reason: str, error: Exception | None = None) -> None:
        self.reason, self.error = reason, error


class Scheduler:
    """A thread that runs all work on the sessions of ``pool``; only this thread touches them.

    ``watch`` has ``step(rows, seconds)`` and ``call(seconds)``, called from the thread.
    """

    def __init__(self, pool: SessionPool, watch: Any = None) -> None:
        self.pool, self.watch = pool, watch
        self._writers = pool.writers()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._joining: deque[Writing] = deque()
        self._active: dict[Writer, Writing] = {}
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def stopped(self) -> bool:
        return self._stopping

    # -- from the event loop --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; called on the event loop that the events go to."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step; what waits gets StoppingError."""
        with self._work:
            self._stopping = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a piece of work in the thread and return its result. Once begun it is not cancelled."""
        done: Future[Any] = Future()
        with self._work:
            if self._stopping:
                raise StoppingError
            self._calls.append((lambda: function(*arguments), done))
            self._work.notify()
        return await asyncio.shield(asyncio.wrap_future(done))

    def write(self, session: Session, look: Callable[[Writer], Any] | None = None, **options: Any) -> Writing:
        """Let a session write, as ``Writers.join``; ``look(writer)`` is called in the thread for each token chosen."""
        writing = Writing(session, look, options)
        with self._work:
            if self._stopping:
                raise StoppingError
            self._joining.append(writing)
            self._work.notify()
        return writing

    def cancel(self, writing: Writing) -> None:
        """End a writing before its next step. Its Finish comes all the same."""
        with self._work:
            writing.stopped = True
            self._work.notify()

    # -- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._work:
                while not (self._stopping or self._calls or self._joining or self._active):
                    self._work.wait()
            until = perf_counter() + SMALL
            while self._next_call() and perf_counter() < until:
                pass
            if self._stopping:
                break
            self._join()
            if self._active:
                self._step()
        self._end()

    def _next_call(self) -> bool:
        """Run the piece of work that waits longest; return whether there was one."""
        with self._work:
            call = self._calls.popleft() if self._calls and not self._stopping else None
        if call is not None:
            self._call(*call)
        return call is not None

    def _call(self, function: Callable[[], Any], done: "Future[Any]") -> None:
        if not done.set_running_or_notify_cancel():
            return
        began = perf_counter()
        try:
            result = function()
        except BaseException as error:  # it goes to whoever asked
            done.set_exception(error)
        else:
            done.set_result(result)
        if self.watch is not None:
            self.watch.call(perf_counter() - began)

    def _join(self) -> None:
        while len(self._active) < self.pool.batch:
            with self._work:
                if not self._joining:
                    return
                writing = self._joining.popleft()
            if writing.stopped:
                self._send([(writing, Finish("cancelled"))])
                continue
            try:
                writing.writer = self._writers.join(writing.session, **writing.options)
            except Exception as error:
                self._send([(writing, Finish("error", error))])
            else:
                self._active[writing.writer] = writing

    def _step(self) -> None:
        for writer, writing in list(self._active.items()):
            if writing.stopped:
                self._writers.leave(writer)
                del self._active[writer]
                self._send([(writing, Finish("cancelled"))])
        if not self._active:
            return
        began, rows = perf_counter(), len(self._active)
        try:
            stepped = self._writers.step()
        except Exception as error:
            self._fail(error)
            return
        events: list[tuple[Writing, Any]] = []
        for writer in stepped:
            writing = self._active[writer]
            events.append((writing, self._news(writing)))
            if writer.finished:
                del self._active[writer]
                events.append((writing, Finish(writer.finished, writer.error)))
            elif writing.look is not None:
                writing.looked = writing.look(writer)
        self._send(events)
        if self.watch is not None:
            self.watch.step(rows, perf_counter() - began)

    def _news(self, writing: Writing) -> tuple[Any, list[int], Any]:
        """Return what a step brought: new text, the ids read since the last news, what ``look`` said about them."""
        writer = writing.writer
        assert writer is not None
        ids, writing.seen = writer.ids[writing.seen :], len(writer.ids)
        looked, writing.looked = (writing.looked, None) if ids else (None, writing.looked)
        return writer.piece, ids, looked

    def _fail(self, error: Exception) -> None:
        """End all who write with an error; their sessions are as before the step."""
        self._writers.close()
        failed, self._active = list(self._active.values()), {}
        self._send([(writing, Finish("error", error)) for writing in failed])

    def _send(self, events: list[tuple[Writing, Any]]) -> None:
        def deliver() -> None:
            for writing, event in events:
                writing.events.put_nowait(event)

        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _end(self) -> None:
        stopped = StoppingError()
        self._fail(stopped)
        for writing in self._joining:
            self._send([(writing, Finish("error", stopped))])
        for _, done in self._calls:
            if done.set_running_or_notify_cancel():
                done.set_exception(stopped)
