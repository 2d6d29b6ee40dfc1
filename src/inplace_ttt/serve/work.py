"""Requests' work on the engine: read, answer, score, ask, fork, and the rest of a session's life.

Functions that may take long get the ``Job`` they run in and tell through it how far they are.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..session import Session
from ..session.sampling import Sampling, StopText
from .engine import Engine, Live
from .jobs import Job
from .journal import IDS, Prompt, pieces_of
from .scheduler import Finish
from .settings import BusyError, ServeError, VersionError
from .store import ConflictError


@dataclass
class Answered:
    """A finished answer: its text, why it ended, tokens read before it and written, what ``look`` found by token."""

    text: str
    reason: str
    prompt_tokens: int
    ids: list[int]
    looked: list[Any]
    version: int | None = None


# -- a session's life --------------------------------------------------------------------------------------------------


async def create(
    engine: Engine, owner: str, id: str, frozen: bool = False, learn: str | None = None, file: Path | None = None
) -> int:
    """Make a session, empty or from a session file; return its version. UserError for a file that does not fit."""
    learn = learn or engine.learn
    engine.learning(learn)
    await _check_count(engine, owner)
    session = None
    if file is not None:
        async with engine.room(1):
            session = await engine.piece(engine.from_file, file, "the session file")
    return await _new(engine, owner, id, session, {"history": [], "frozen": frozen, "learn": learn})


async def fork(engine: Engine, owner: str, id: str, new: str, version: int | None = None) -> int:
    """Copy a session under another id; return its version."""
    await _check_count(engine, owner)
    async with engine.use(owner, id, version) as live:
        copy = await engine.piece(live.loaded.fork)
        return await _new(engine, owner, new, copy, live.values())


async def delete(engine: Engine, owner: str, id: str) -> None:
    async with engine.use(owner, id) as live:
        await asyncio.to_thread(engine.store.delete, live.key)
        engine.forget(live)


async def index(engine: Engine, owner: str) -> list[dict[str, Any]]:
    found = await asyncio.to_thread(engine.store.of_owner, owner)
    loaded = {live.key for live in engine.loaded}
    return [
        {"id": about["id"], "object": "session", "created": int(about["created"]), "in_memory": key in loaded}
        for key, about in found
    ]


async def describe(engine: Engine, owner: str, id: str, diagnostics: bool = True) -> dict[str, Any]:
    """Describe where a session stands, and what the updates did to each layer."""
    async with engine.use(owner, id) as live:
        found = await engine.piece(live.loaded.stats)
        layers = await engine.piece(live.loaded.diagnostics) if diagnostics else []
        record = await asyncio.to_thread(engine.store.record, live.key)
        return {
            "id": id,
            "object": "session",
            "version": live.version,
            "frozen": live.frozen,
            "learn": live.learn,
            "saved": record.saved if record else [],
            "stats": found.to_dict(),
            "diagnostics": [layer.__dict__ for layer in layers],
            "timeline": [{k: v for k, v in s.items() if k != "layers"} for s in live.loaded.timeline.to_list()],
        }


async def change(engine: Engine, owner: str, id: str, entry: dict[str, Any], version: int | None = None) -> int:
    """Reset, freeze or thaw a session; return its version."""
    async with engine.use(owner, id, version) as live:
        if entry["op"] != "freeze":
            _check_thawed(live)
        await engine.do(live, entry)
        return live.version


async def save(engine: Engine, owner: str, id: str, version: int | None = None) -> int:
    """Store the present state as one to come back to; return its version."""
    async with engine.use(owner, id, version) as live:
        await engine.store_now(live)
        await asyncio.to_thread(engine.store.mark_saved, live.key, live.stored)
        return live.version


async def rollback(engine: Engine, owner: str, id: str, to: int | None, version: int | None = None) -> int:
    """Go back to a saved version (the last one, if not said), which makes a new version."""
    async with engine.use(owner, id, version) as live:
        _check_thawed(live)
        record = await asyncio.to_thread(engine.store.record, live.key)
        saved = record.saved if record else []
        if not saved:
            raise VersionError(f"session {id} has no saved version to go back to: save it first")
        if to is not None and to not in saved:
            raise VersionError(f"session {id} has no saved version {to}, only {', '.join(map(str, saved))}")
        await engine.do(live, {"op": "rollback", "to": saved[-1] if to is None else to})
        await engine.store_now(live)
        return live.version


async def export(engine: Engine, owner: str, id: str, rank: int | None, folder: Path | None) -> dict[str, Any]:
    """Export what a session learned as a LoRA adapter: below ``folder`` ("path"), or as a zip file ("zip")."""
    async with engine.use(owner, id, copies=1) as live:
        copy, version, key = await engine.piece(live.loaded.fork), live.version, live.key
    name = f"{id}-v{version}"
    with tempfile.TemporaryDirectory() as place:
        layers = await asyncio.to_thread(copy.export_lora, Path(place) / name, rank)
        found: dict[str, Any] = {"name": name, "version": version, "layers": [layer.__dict__ for layer in layers]}
        if folder is None:
            packed = await asyncio.to_thread(shutil.make_archive, f"{place}/zip", "zip", place, name)
            return {**found, "zip": Path(packed).read_bytes()}
        target = folder / f"{key.replace('/', '-')}-v{version}"
        await asyncio.to_thread(shutil.copytree, Path(place) / name, target, dirs_exist_ok=True)
        return {**found, "path": str(target.resolve())}


async def download(engine: Engine, owner: str, id: str) -> bytes:
    async with engine.use(owner, id) as live:
        copy = await engine.piece(live.loaded.fork)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "session"
        await asyncio.to_thread(copy.save, path)
        return await asyncio.to_thread(path.read_bytes)


# -- reading -----------------------------------------------------------------------------------------------------------


async def read(
    engine: Engine, job: Job, owner: str, id: str, text: str, version: int | None = None, learn: str | None = None
) -> dict[str, Any]:
    """Read a text into a session, piece by piece; stopped, it ends after the present one.

    A text that is not to be learned is tokenised on its own.
    """
    async with engine.use(owner, id, version) as live:
        _check_thawed(live)
        began, before, done = time.perf_counter(), live.tokens, 0
        is_learned, _ = engine.learning(learn or live.learn)
        source: Any = text
        if not is_learned:
            source = await engine.with_tokenizer(lambda tokenizer: _plain_ids(tokenizer, text))
        size = engine.limits.piece if is_learned else IDS
        for at in range(0, len(source), size):
            if job.stopped:
                break
            part = source[at : at + size]
            what = {"text": part} if is_learned else {"ids": part, "exact": at > 0, "learn": False}
            await engine.do(live, {"op": "read", **what})
            await engine.keep_up(live)
            done = len(text) * min(at + size, len(source)) // len(source)
            progress: dict[str, Any] = {"characters": done, "of": len(text), "tokens": live.tokens - before}
            progress |= {"seconds": time.perf_counter() - began, "version": live.version, "bytes": live.held}
            if samples := live.loaded.timeline.samples:
                newest = samples[-1]
                progress["probe"] = {"tokens": newest.tokens, "on": newest.loss_on, "off": newest.loss_off}
            job.emit(progress)
        warning = (await engine.piece(live.loaded.stats)).warning
        return {
            "id": id,
            "tokens": live.tokens - before,
            "characters": done,
            "complete": done == len(text),
            "seconds": time.perf_counter() - began,
            "version": live.version,
            "warning": warning,
        }


async def score(engine: Engine, job: Job, owner: str, id: str, text: str, losses: bool) -> dict[str, Any]:
    """Score a text as a session's continuation; the session stays as it was."""
    ids = await engine.with_tokenizer(lambda tokenizer: _plain_ids(tokenizer, text))
    found: list[float] = []
    async with engine.use(owner, id, copies=1) as live:
        copy: Session = await engine.piece(live.loaded.fork)
        if (await engine.piece(copy.stats)).held_characters:
            await engine.piece(lambda: copy.generate(max_new_tokens=0))
        for at in range(0, len(ids), IDS):
            if job.stopped:
                break
            part = await engine.piece(lambda at=at: copy.read(ids[at : at + IDS], scored=True))
            found += part.losses
    mean = sum(found) / len(found) if found else None
    return {"id": id, "tokens": len(ids), "mean": mean, **({"losses": found} if losses else {})}


# -- writing -----------------------------------------------------------------------------------------------------------

Render = Callable[[Session, Live | None], Prompt]
"""Says what is read before an answer, given the session that reads it (and what is known of it)."""


async def answer(
    engine: Engine,
    job: Job,
    owner: str,
    id: str | None,
    renders: list[Render],
    options: dict[str, Any],
    *,
    choices: int = 1,
    version: int | None = None,
    look: Any = None,
    remember: Callable[[str], str] | None = None,
    context: bool = True,
    learn: str | None = None,
) -> list[Answered]:
    """Answer prompts, each ``choices`` times, and tell (index, piece of text, ids, looked) and (index, Finish).

    With ``id`` the session reads and learns what it reads and writes, unless it is frozen or ``context`` is False
    (from its fast weights alone): then copies answer, as new sessions do without ``id``. ``remember`` makes the digest
    of the answer that the session knows from then on. ``learn``: a name in ``LEARN``; None: as the session. A
    job that is stopped ends its answers, with what they have.
    """
    sampling = {name: value for name, value in options.items() if name not in ("max_new_tokens", "stop")}
    Sampling(**sampling)  # raises for values out of range, and the next for empty texts, before anything is read
    StopText(options.get("stop", ()))
    count = len(renders) * choices
    if id is None:
        reads, options["learn"] = engine.learning(learn or engine.learn)
        async with engine.room(count):
            starts = [await engine.piece(engine.blank.fork) for _ in renders]
            pairs = [(s, await _rendered(engine, r, s, None, reads)) for s, r in zip(starts, renders, strict=True)]
            return await _answers(engine, job, pairs, options, choices, look)
    async with engine.use(owner, id, version, copies=count) as live:
        reads, options["learn"] = engine.learning(learn or live.learn)
        if context and not live.frozen:
            if count > 1:
                raise ServeError("a session that learns gives one answer at a time: n and the number of prompts are 1")
            return [await _learning(engine, job, live, renders[0], options, look, remember, reads)]
        copy: Session = await engine.piece(live.loaded.fork)
        if not context:
            await engine.piece(copy.drop_context)
        starts = [copy, *[await engine.piece(copy.fork) for _ in renders[1:]]]
        known = live if context else None
        pairs = [(s, await _rendered(engine, r, s, known, reads)) for s, r in zip(starts, renders, strict=True)]
        found = await _answers(engine, job, pairs, options, choices, look)
        for each in found:
            each.version = live.version
        return found


async def _learning(
    engine: Engine, job: Job, live: Live, render: Render, options: dict[str, Any], look: Any, remember: Any, reads: bool
) -> Answered:
    session, before = live.loaded, live.tokens
    prompt = await _rendered(engine, render, session, live, reads)
    if prompt.text or prompt.ids:
        await engine.do(live, prompt.entry())
    await engine.keep_up(live)
    found, noted = Answered("", "stop", live.tokens - before, [], []), 0

    async def note(at_least: int, **values: Any) -> None:
        nonlocal noted
        ids = found.ids[noted:]
        if live.session is None or len(ids) < at_least:
            return
        noted = len(found.ids)
        try:
            await engine.note(live, {"op": "wrote", "ids": ids, "learn": options["learn"], **values})
        except Exception:
            engine.forget(live)  # it holds what the journal does not
            job.stop()
            raise

    try:
        await _write(engine, job, session, found, look, options, after=lambda: note(engine.chunk_size))
    finally:
        if found.ids:
            messages = [remember(found.text)] if remember else []
            await note(0, messages=messages)
            live.history += messages
    found.version = live.version
    return found


async def _answers(
    engine: Engine, job: Job, prompts: list[tuple[Session, Prompt]], options: dict[str, Any], choices: int, look: Any
) -> list[Answered]:
    """Answer on sessions that nobody keeps."""
    running: list[Awaitable[Answered]] = []
    for session, prompt in prompts:
        before = (await engine.piece(session.stats)).tokens
        for work in pieces_of(prompt.entry(), session, engine.limits.piece):
            await engine.piece(work)
        tokens = (await engine.piece(session.stats)).tokens - before
        for twin in range(choices):
            own, index = dict(options), len(running)
            if own.get("seed") is not None:
                own["seed"] += twin  # answers to one prompt differ
            writer = session if twin == choices - 1 else await engine.piece(session.fork)
            running.append(_write(engine, job, writer, Answered("", "stop", tokens, [], []), look, own, index))
    results = await asyncio.gather(*running, return_exceptions=True)
    for result in results:  # when all have ended
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def _write(
    engine: Engine, job: Job, session: Session, found: Answered, look: Any, options: dict[str, Any], index: int = 0,
    after: Any = None,
) -> Answered:  # fmt: skip
    """Let a session write: tell the job what comes and fill in ``found``; ``after()`` is awaited each time."""
    writing = job.follow(engine.scheduler.write(session, look, **options))
    while not isinstance(event := await writing.events.get(), Finish):
        piece, ids, looked = event
        found.text += piece
        found.ids += ids
        found.looked += [looked] if ids else []
        if piece or ids:
            job.emit((index, piece, ids, looked))
        if after is not None:
            await after()
    if event.error is not None:
        raise event.error
    found.reason = event.reason
    job.emit((index, event))
    return found


# -- inside ------------------------------------------------------------------------------------------------------------


def _check_thawed(live: Live) -> None:
    if live.frozen:
        raise VersionError(f"session {live.id} is frozen: it answers, and learns nothing. Fork or thaw it")


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


async def _rendered(engine: Engine, render: Render, session: Session, live: Live | None, learn: bool) -> Prompt:
    """Render what is read before an answer; ServeError when that is too long."""
    prompt: Prompt = await engine.with_tokenizer(lambda tokenizer: render(session, live))
    ids = prompt.ids
    if ids is None:
        ids = await engine.with_tokenizer(lambda tokenizer: _plain_ids(tokenizer, prompt.text or ""))
    if len(ids) > engine.limits.prompt:
        raise ServeError(
            f"the prompt has {len(ids):,} tokens, this server takes {engine.limits.prompt:,}: read long texts into a "
            "session",
            code="context_length_exceeded",
        )
    return prompt if learn else replace(prompt, text=None, ids=ids, learn=False)


async def _check_count(engine: Engine, owner: str) -> None:
    if await asyncio.to_thread(engine.store.count, owner) >= engine.limits.sessions:
        raise BusyError(f"you have {engine.limits.sessions} sessions, which is the most: delete one first", 60)


async def _new(engine: Engine, owner: str, id: str, session: Session | None, values: dict[str, Any]) -> int:
    """Store a new session in a state; return its version."""
    try:
        key = await asyncio.to_thread(engine.store.create, owner, id, {"created": time.time()})
    except ConflictError as error:
        raise VersionError(f"{error}: choose another id") from None
    state = session or await engine.piece(engine.blank.fork)
    await asyncio.to_thread(engine.store.add_state, key, 0, state.save, values)
    return 0
