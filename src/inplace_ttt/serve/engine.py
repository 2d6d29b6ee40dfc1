"""All sessions of a server: loaded when they are wanted, written back when there is no room, never mixed up.

Everything here runs on one event loop; the sessions themselves are touched by the scheduler's thread alone.
"""

import asyncio
import copy
import ctypes
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..hf.attach import adapting_layers, runtime_of
from ..session import Session, SessionPool
from .jobs import Job
from .journal import REMEMBERED, pieces_of
from .scheduler import Scheduler
from .settings import LEARN, LEARN_CHOICES, BusyError, Limits, NotFoundError, StoppingError, VersionError
from .store import ConflictError, Store

TRIM_EVERY = 5.0
"""Seconds between two times that freed memory goes back to the system, at least."""
GONE = "there is no session {}"


@dataclass(eq=False)
class Live:
    """A session that somebody uses or that is still in memory (``session``). ``lock``: one request at a time."""

    key: str
    id: str
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    session: Session | None = None
    version: int = 0
    stored: int = 0
    """Version of its newest state on disk."""
    unsaved: int = 0
    """Tokens read since then."""
    tokens: int = 0
    held: int = 0
    """Bytes in memory when it was last looked at."""
    active: bool = False
    """True while a request works on it; otherwise it may go to disk."""
    frozen: bool = False
    learn: str = "all"
    """Its setting unless a request gives another: a name in ``LEARN``."""
    history: list[str] = field(default_factory=list)
    storing: asyncio.Task[None] | None = None
    users: int = 0
    used: float = 0.0

    def values(self) -> dict[str, Any]:
        """Return what is stored beside the session's own file."""
        return {"history": self.history, "frozen": self.frozen, "learn": self.learn}

    @property
    def loaded(self) -> Session:
        """Return the session; only while it is in use."""
        assert self.session is not None
        return self.session


class Engine:
    """Sessions of many owners on one model. ``options``: how sessions read, as for ``Session``.

    ``learn``: what new sessions learn (a name in ``LEARN``), or "frozen"; None: as the model's configuration says.
    Methods that take an owner and an id raise NotFoundError for a session of somebody else just as for none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: Store,
        limits: Limits | None = None,
        watch: Any = None,
        learn: str | None = None,
        **options: Any,
    ) -> None:
        self.limits, self.store = limits or Limits(), store
        self.tokenizer, self._tokenizer_lock = copy.deepcopy(tokenizer), threading.Lock()
        # A copy: the scheduler's thread uses the other one meanwhile.
        self.pool = SessionPool(model, tokenizer, batch=self.limits.batch, **options)
        self.blank = self.pool.open("blank")
        self.chunk_size: int = self.blank.stats().settings["chunk_size"]
        config = runtime_of(model).config
        self.frozen = learn == "frozen"
        self._chooses = config.objective == "loss"
        self.learn = (config.learn if self._chooses else "all") if learn in (None, "frozen") else str(learn)
        self.learning(self.learn)
        self.scheduler = Scheduler(self.pool, watch)
        self.piece = self.scheduler.call
        self.jobs: set[Job] = set()
        self.stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.budget = _memory(model) if self.limits.memory is None else self.limits.memory
        self._live: dict[str, Live] = {}
        self._active = 0
        self._largest = sum(4 * D * F for D, F in (layer.shape for layer in adapting_layers(model)))
        self._waiting = 0
        self._freed = asyncio.Condition()
        self._admitting = asyncio.Lock()
        self._shrinking: asyncio.Future[None] | None = None
        self._trimmed = 0.0

    def learning(self, learn: str) -> tuple[bool, bool]:
        """Return whether what is read and what is written is learned. UserError where this model cannot choose."""
        if learn not in LEARN:
            raise UserError(f"learn {learn!r}: {LEARN_CHOICES}")
        if learn != "all" and not self._chooses:
            raise UserError(
                f'learn {learn!r} needs a model with objective "loss": this one learns all that a session reads and '
                "writes. Freeze the session, or answer on a fork"
            )
        return LEARN[learn]

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.scheduler.start()

    def begin_stop(self) -> None:
        """Take no more requests; end those that still run after ``limits.grace`` seconds. From any thread."""
        self.stopping = True

        loop = self._loop
        if loop is not None:
            loop.call_soon_threadsafe(loop.call_later, self.limits.grace, self._stop_jobs)

    def _stop_jobs(self) -> None:
        for job in self.jobs:
            job.stop()

    async def stop(self) -> None:
        """Let running jobs finish for ``limits.grace`` seconds, end the others in order, store every session."""
        self.stopping = True
        for patience in (self.limits.grace, 10.0):
            if self.jobs:
                await asyncio.wait([job.task for job in self.jobs], timeout=patience)
            self._stop_jobs()
        if self._shrinking is not None:
            await self._shrinking
        for live in list(self._live.values()):
            if live.session is not None and not live.lock.locked():
                async with live.lock:
                    await self.store_now(live)
        await self.scheduler.stop()
        if self.jobs:  # what still runs gets the scheduler's StoppingError
            await asyncio.wait([job.task for job in self.jobs], timeout=5)

    def begin(self, work: Callable[[Job], Awaitable[Any]]) -> Job:
        """Begin a job. BusyError when too many run, StoppingError when the server stops."""
        if self.stopping:
            raise StoppingError
        if len(self.jobs) >= self.limits.batch + self.limits.queue:
            raise BusyError("too many requests wait already: try again later", 2)
        job = Job(self.scheduler, work)
        self.jobs.add(job)
        job.task.add_done_callback(lambda _: self._ended(job))
        return job

    def _ended(self, job: Job) -> None:
        self.jobs.discard(job)
        if not job.task.cancelled():
            job.task.exception()  # whoever waits for the job gets it; nobody may

    @property
    def loaded(self) -> list[Live]:
        return [live for live in self._live.values() if live.session is not None]

    @property
    def bytes(self) -> int:
        """Return the memory of all sessions: what idle ones hold, and what running requests may come to hold."""
        return self._active + sum(live.held for live in self.loaded if not live.active)

    # -- one session ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, owner: str, id: str, version: int | None = None, copies: int = 0) -> AsyncIterator[Live]:
        """Load a session for one request at a time, and hold room for copies of it.

        Raises VersionError unless it is at ``version`` (None: any), BusyError when there is no room.
        """
        key = self.store.key(owner, id)
        live = self._live.setdefault(key, Live(key, id))
        if live.users > self.limits.queue:
            raise BusyError(f"too many requests wait for session {id} already", 2)
        live.users += 1
        try:
            async with live.lock:
                newest = await self._newest(live)
                async with self.room(1 + copies, live):
                    await self._make_ready(live, newest)
                    if version is not None and version != live.version:
                        raise VersionError(
                            f"session {id} is at version {live.version}, not {version}: look at it again"
                        )
                    try:
                        yield live
                    finally:
                        await self.keep_up(live)
                        if live.storing is not None:
                            await live.storing
        finally:
            live.users -= 1
            live.used = time.monotonic()
            self._forget_if_empty(live)

    @asynccontextmanager
    async def room(self, sessions: int, live: Live | None = None) -> AsyncIterator[None]:
        """Hold memory for so many sessions, ``live`` among them. BusyError when there is none for some time.

        Nobody asks for more while he has some, so those who wait do not wait for each other.
        """
        need = sessions * self._largest
        await self._admit(need, live)
        try:
            yield
        finally:
            self._active -= need
            if live is not None:
                live.active = False
            if self.bytes > self.budget and (self._shrinking is None or self._shrinking.done()):
                self._shrinking = asyncio.create_task(self._evict_idle())
            async with self._freed:
                self._freed.notify_all()

    async def do(self, live: Live, entry: dict[str, Any]) -> None:
        """Note an entry in the journal, then do it."""
        await self.note(live, entry)
        await self._apply(live, entry)

    async def note(self, live: Live, entry: dict[str, Any]) -> None:
        """Note in the journal what was done or is about to be done, which makes a new version."""
        try:
            await asyncio.to_thread(self.store.append, live.key, live.version + 1, entry)
        except ConflictError:
            self.forget(live)
            raise VersionError(f"session {live.id} was changed by somebody else meanwhile: look at it again") from None
        live.version += 1

    async def keep_up(self, live: Live) -> None:
        """Take stock of a session; store its state, beside other work, when much is in the journal alone."""
        await self._measure(live)
        if live.unsaved < self.limits.unsaved or (live.storing and not live.storing.done()) or live.session is None:
            return
        twin = await self.piece(live.loaded.fork)
        version, live.unsaved = live.version, 0
        live.storing = asyncio.create_task(self._add_state(live, twin, version, live.values()))

    async def with_tokenizer(self, function: Callable[[Any], Any]) -> Any:
        """Run ``function(tokenizer)`` aside; the tokenizer is a copy that nobody else uses at the same time."""

        def run() -> Any:
            with self._tokenizer_lock:
                return function(self.tokenizer)

        return await asyncio.to_thread(run)

    async def store_now(self, live: Live, again: bool = False) -> None:
        """Store the present state, unless its version is stored."""
        if live.stored == live.version and not again and live.version:
            return
        if live.storing is not None:
            await live.storing
        twin = await self.piece(live.loaded.fork)
        await self._add_state(live, twin, live.version, live.values())
        live.unsaved = 0

    def from_file(self, path: Path, what: str) -> Session:
        """Load a session file, called ``what`` in errors; a piece of work. UserError for one that does not fit."""
        try:
            session = self.pool.load("loading", path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), what)) from None
        self.pool.close("loading")
        return session

    def forget(self, live: Live) -> None:
        """Forget what is in memory; what is on disk counts."""
        live.session, live.held, live.tokens = None, 0, 0

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _newest(self, live: Live) -> int:
        """Return a session's version on disk. NotFoundError when there is no such session."""
        newest = await asyncio.to_thread(self.store.version, live.key)
        if newest is None or await asyncio.to_thread(self.store.about, live.key) is None:
            self.forget(live)
            raise NotFoundError(GONE.format(live.id))
        return newest

    async def _make_ready(self, live: Live, newest: int) -> None:
        """Load the session unless it is in memory at its newest version."""
        if live.session is not None and live.version == newest:
            return
        self.forget(live)
        try:
            record = await asyncio.to_thread(self.store.record, live.key)
            if record is None:
                raise NotFoundError(GONE.format(live.id))
            live.version = live.stored = live.unsaved = 0
            live.history, live.frozen, live.learn = [], False, self.learn
            await self._restore(live, record.state)
            live.tokens = (await self.piece(live.loaded.stats)).tokens
            for entry in record.entries:
                live.version += 1
                with suppress(UserError):  # as it was when this was done first
                    await self._apply(live, entry)
            await self._measure(live)
        except BaseException:
            self.forget(live)
            raise

    async def _restore(self, live: Live, state: Any) -> None:
        """Put a stored state in place of the session."""
        if state is None:
            live.session = await self.piece(self.blank.fork)
            return
        with self.store.opened(state) as path:
            try:
                live.session = await self.piece(self.from_file, path, "its state")
            except UserError as error:
                raise VersionError(f"session {live.id} does not fit this server: {error}") from None
        live.version = live.stored = state.version
        live.history, live.frozen = list(state.values["history"]), bool(state.values["frozen"])
        live.learn = state.values.get("learn", self.learn)

    async def _apply(self, live: Live, entry: dict[str, Any]) -> None:
        """Do what an entry says. When that fails midway the state of that moment is stored: it counts."""
        if entry["op"] == "freeze":
            live.frozen = entry["frozen"]
            return
        if entry["op"] == "rollback":
            version = live.version
            await self._restore(live, await asyncio.to_thread(self.store.state, live.key, entry["to"]))
            live.version = version
            return
        try:
            for work in pieces_of(entry, live.loaded, self.limits.piece):
                await self.piece(work)
        except StoppingError:
            raise
        except Exception:
            await self.store_now(live, again=True)
            raise
        live.history = [] if entry["op"] == "reset" else [*live.history, *entry.get("messages", [])][-REMEMBERED:]

    async def _add_state(self, live: Live, twin: Session, version: int, values: dict[str, Any]) -> None:
        await asyncio.to_thread(self.store.add_state, live.key, version, twin.save, values)
        live.stored = version

    async def _measure(self, live: Live) -> None:
        if live.session is None:
            return
        stats = await self.piece(live.session.stats)
        live.unsaved += max(0, stats.tokens - live.tokens)
        live.tokens, live.held = stats.tokens, stats.bytes_context + stats.bytes_fast_weights
        self._largest = max(self._largest, live.held)

    async def _admit(self, need: int, live: Live | None) -> None:
        """Wait until ``need`` bytes more may be in use (a request alone may use any), then make room for them."""
        until = time.monotonic() + self.limits.patience
        while True:
            async with self._admitting:
                if not self._active or self._active + need <= self.budget:
                    self._active += need
                    if live is not None:
                        live.active = True
                    break
            await self._wait_for_room(until)
        await self._evict_idle()

    async def _wait_for_room(self, until: float) -> None:
        left = until - time.monotonic()
        if left <= 0 or self._waiting >= self.limits.queue:
            raise BusyError("all memory for sessions is in use: try again later", 5)
        self._waiting += 1
        try:
            async with self._freed:
                await asyncio.wait_for(self._freed.wait(), min(left, 1.0))
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1

    async def _evict_idle(self) -> None:
        """Write idle sessions back, the longest idle first, until all fit.

        A request that waits for memory does not touch its session, so that may go, too; while it goes nobody is
        admitted.
        """
        async with self._admitting:
            while self.bytes > self.budget and not self.scheduler.stopped:
                idle = [live for live in self.loaded if not live.active]
                if not idle:
                    return
                live = min(idle, key=lambda live: live.used)
                await self.store_now(live)
                self.forget(live)
                self._forget_if_empty(live)
                if time.monotonic() - self._trimmed > TRIM_EVERY:
                    self._trimmed = time.monotonic()
                    await asyncio.to_thread(_give_back)

    def _forget_if_empty(self, live: Live) -> None:
        if not live.users and live.session is None:
            self._live.pop(live.key, None)


def _give_back() -> None:
    """Let the C library return freed memory to the system: what states leave behind is in pieces all over its heap."""
    with suppress(OSError, AttributeError):  # only glibc has this
        ctypes.CDLL(None).malloc_trim(0)


def _memory(model: Any) -> int:
    """Return the bytes for sessions: half of what is free on a GPU, a quarter of what is free elsewhere."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        found = None
    return int(found.group(1)) * 1024 // 4 if found else 2 << 30
