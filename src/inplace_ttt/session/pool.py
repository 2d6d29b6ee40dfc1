"""Many sessions on one model that generate in one batch."""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hf.attach import adapting_layers
from ..hf.rows import merge, split
from .session import Session
from .stream import Reader, Stream, is_count, whole
from .writing import Writer, check_continuable, read_prompt


class SessionPool:
    """A set of named sessions that share a model and settings. ``generate`` batches their decode steps.

    Each session generates the same as alone (up to rounding: the same products in a batch of another size). They may
    differ in everything: length, tokens pending, context, weights. ``batch``: the most rows of one step; further
    sessions wait until another has finished. Options as for ``Session``; ``state="auto"`` or a rank makes idle and
    active sessions smaller.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, batch: int = 32, **options: Any) -> None:
        if not is_count(batch, 1):
            raise UserError(f"batch {batch!r}: a whole number of at least 1")
        self.batch = batch
        self._blank = Session(model, tokenizer, **options)
        self._sessions: dict[str, Session] = {}

    # -- a mapping of sessions ------------------------------------------------------------------------------------

    def open(self, name: str) -> Session:
        """Return the session ``name``, a new one if there is none."""
        if name not in self._sessions:
            self._sessions[name] = self._blank.fork()
        return self._sessions[name]

    def add(self, name: str, session: Session) -> Session:
        """Add a session (a fork of another one, say).

        Raises UserError when the name is taken, the session is in here already, is writing at the moment, or reads with
        other settings.
        """
        if name in self._sessions:
            raise UserError(f"there is a session {name!r} already: close it first")
        if any(session is other for other in self._sessions.values()):
            raise UserError("this session is in the pool already, under another name: add a fork of it")
        session._check_idle()
        own, other = self._blank._reader, session._reader
        if not own.reads_like(other):
            raise UserError(f"session {name!r} belongs to another model or reads with other settings than this pool")
        session._reader = own
        self._sessions[name] = session
        return session

    def fork(self, name: str, new: str) -> Session:
        """Copy the session ``name`` to a new name."""
        return self.add(new, self[name].fork())

    def load(self, name: str, path: str | Path) -> Session:
        """Load a session from a file."""
        return self.add(name, Session.load(path, self._blank._reader.model, self._blank.tokenizer))

    def close(self, name: str) -> None:
        """Remove a session from the pool."""
        self[name]._check_idle()
        del self._sessions[name]

    def __getitem__(self, name: str) -> Session:
        if name not in self._sessions:
            raise UserError(f"no session {name!r}: open it first")
        return self._sessions[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sessions

    def __iter__(self) -> Iterator[str]:
        return iter(self._sessions)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Return the bytes that all sessions hold; tensors that forks share are counted for each of them."""
        stats = [session.stats() for session in self._sessions.values()]
        return sum(s.bytes_context + s.bytes_fast_weights for s in stats)

    # -- writing --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Mapping[str, Any] | Sequence[str],
        *,
        max_new_tokens: int = 256,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Any:
        """Continue several sessions: a prompt (or None) by name, or names alone. Options as for ``Session.generate``.

        Returns the new texts by name; with ``stream`` an iterator over (name, piece) as they come. Sessions without a
        tokenizer give lists of ids. Sessions that a name does not find are opened.

        Raises UserError, before any session has read or written anything, where one is busy or has nothing to continue.
        After another exception (a prompt that cannot be read, Ctrl-C) every session keeps what it read and wrote.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts by name, or a list of names, not a text: [{prompts!r}]")
        wanted = dict(prompts) if isinstance(prompts, Mapping) else dict.fromkeys(prompts)
        Writer(self._blank, max_new_tokens, stop, sampling)  # raises where a setting is wrong
        pieces = self._run(wanted, max_new_tokens, stop, sampling)
        if stream:
            return pieces
        by_ids = {name: self._sessions.get(name, self._blank).tokenizer is None for name in wanted}
        found: dict[str, Any] = {name: [] if ids else "" for name, ids in by_ids.items()}
        with closing(pieces):
            for name, piece in pieces:
                found[name] += piece
        return found

    def writers(self) -> "Writers":
        """Return the pool's sessions as writers that join and leave while others write. One such set at a time."""
        return Writers(self._blank._reader)

    def _run(
        self, prompts: Mapping[str, Any], most: int, stop: str | Sequence[str], sampling: Mapping[str, Any]
    ) -> Generator[tuple[str, Any], None, None]:
        with ExitStack() as stack:
            sessions = {name: self.open(name) for name in prompts}
            for session in sessions.values():
                stack.enter_context(session._exclusive())
            for name, session in sessions.items():
                check_continuable(session, prompts[name])
            waiting = list(reversed(sessions))
            names: dict[Writer, str] = {}
            with closing(self.writers()) as batch:
                while waiting or names:
                    while waiting and len(names) < self.batch:
                        name = waiting.pop()
                        read_prompt(sessions[name], prompts[name])
                        writer = Writer(sessions[name], most, stop, sampling)
                        batch.active.append(writer)
                        names[writer] = name
                    for writer in batch.step():
                        if writer.error:
                            raise writer.error
                        if writer.piece:
                            yield names[writer], writer.piece
                        if writer.finished:
                            del names[writer]


class Writers:
    """Sessions that generate together, one token each per step. Between steps others may join and any may leave.

    A session is busy from ``join`` until it has finished or left; each generates the same as alone.
    """

    def __init__(self, reader: Reader) -> None:
        reader.check_attached()
        self.active: list[Writer] = []
        self._reader = reader
        self._batches = (_Batch(reader), _Batch(reader))
        """Sessions whose state is pairs and sessions whose state is S, so that one does not slow the other."""
        sizes = [D * F / (D + F) for D, F in (info.shape for info in adapting_layers(reader.model))]
        self._most_pairs = min(sizes) if reader.form == "auto" else math.inf

    def join(
        self,
        session: Session,
        *,
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        learn: bool | None = None,
        **sampling: Any,
    ) -> Writer:
        """Let a session of the pool write from the next step on. Reads held characters, or BOS where nothing else is.

        Options as for ``Session.generate``; ``learn``: whether it learns what it writes (objective "loss"; None: as
        the configuration says). Raises UserError on settings out of range, and where the session is busy or has
        nothing to continue.
        """
        if session._reader is not self._reader:
            raise UserError("this session is not in this pool: add it first")
        writer = Writer(session, max_new_tokens, stop, sampling, learn=learn)
        with ExitStack() as held:
            held.enter_context(session._exclusive())
            read_prompt(session, None)
            writer.held = held.pop_all()
        self.active.append(writer)
        return writer

    def leave(self, writer: Writer) -> None:
        """Remove a writer between two steps; its tokens stay in the session. Harmless when it has finished."""
        if writer in self.active:
            self._unmerge()  # gives the session its cache back
            self.active.remove(writer)
            writer.held.close()

    def step(self) -> list[Writer]:
        """Feed every session its sampled token, all in one batch, and sample the next one.

        Returns the writers; the finished ones are out. A session whose prediction is not a number or whose context is
        full finishes with an error, the others continue. After another exception all sessions are as before the step.
        """
        for writer in self.active:
            writer.piece = ""
            if writer.token is not None and not self._reader.fits(writer.stream, 1):
                try:
                    self._reader.make_room(writer.stream)
                except UserError as error:
                    writer.fail(error)
        self._feed([writer for writer in self.active if writer.token is not None])
        stepped = list(self.active)
        for writer, token in zip(stepped, self._most_likely(stepped), strict=True):
            if not writer.finished:
                assert writer.stream.logits is not None
                writer.choose(writer.stream.logits, token)
        self.active = [writer for writer in stepped if not writer.finished]
        if len(self.active) < len(stepped):
            self._unmerge()  # a session that has finished needs its cache
        for writer in stepped:
            if writer.finished:
                writer.held.close()
        return stepped

    def _feed(self, writers: list[Writer]) -> None:
        """Feed each writer's token."""
        if self._reader.by_loss:  # each full chunk is run again from its own context, so no batching
            for writer in writers:
                for _ in self._reader.feed(writer.stream, [writer.token or 0], learn=writer.learn):
                    pass
        else:
            groups = [[w for w in writers if self._is_dense_next(w.stream) == dense] for dense in (False, True)]
            for batch, group in zip(self._batches, groups, strict=True):
                batch.keep(group)  # both before any step: a session may move to the other batch
            for batch, group in zip(self._batches, groups, strict=True):
                if group:
                    batch.step(group)
        for writer in writers:
            writer.was_read()

    def _is_dense_next(self, stream: Stream) -> bool:
        """Return whether the state becomes dense (too many pairs) when the current chunk is complete."""
        C = self._reader.config.chunk_size
        return (stream.tokens // C + 1) * C >= self._most_pairs

    def _unmerge(self) -> None:
        for batch in self._batches:
            batch.close()

    def _most_likely(self, writers: list[Writer]) -> list[int | None]:
        """Return the most likely tokens where that is all a sampler asks for: one short transfer for all sessions.

        None for the others, and where a prediction is not a number.
        """
        wanted = [w.sampler.is_greedy for w in writers]
        if not any(wanted):
            return [None] * len(writers)
        logits: Any = torch.stack([w.stream.logits for w in writers])  # type: ignore[misc]
        highest = logits.argmax(-1)
        is_number = ~logits.gather(-1, highest[:, None])[:, 0].isnan()  # the largest of numbers with a nan is nan
        found = zip(highest.where(is_number, -1).tolist(), wanted, strict=True)
        return [token if is_greedy and token >= 0 else None for token, is_greedy in found]

    def close(self) -> None:
        """Let all writers leave."""
        self._unmerge()
        for writer in self.active:
            writer.held.close()
        self.active = []


class _Batch:
    """Writers whose sessions' caches are merged into one, for as long as the same ones take part."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.writers: list[Writer] = []
        self.cache: Any = None
        self.mask: Tensor = torch.zeros(0, 0, dtype=torch.int64)

    def keep(self, writers: list[Writer]) -> None:
        """Let the writers of this batch go unless they are these same ones, with room for one more token."""
        if writers != self.writers or any(self.reader.room(writer.stream) <= 0 for writer in writers):
            self.close()

    def step(self, writers: list[Writer]) -> None:
        """Feed each writer's token. ``keep`` comes first."""
        streams = [writer.stream for writer in writers]
        if self.cache is None:
            for stream in streams:
                self.reader.make_room(stream)
            self.cache, self.mask = merge([stream.cache for stream in streams], self.reader.root.config)
            self.writers = writers
        mask = torch.cat([self.mask, torch.ones(len(streams), 1, dtype=torch.int64)], 1)
        tokens = torch.tensor([[writer.token] for writer in writers])
        positions = torch.tensor([[stream.position] for stream in streams])
        with whole(self.cache):
            logits = self.reader.call(self.cache, tokens, positions, mask)
        self.mask = mask
        for writer, row in zip(writers, logits, strict=True):
            assert writer.token is not None
            self.reader.advance(writer.stream, [writer.token], row[-1])

    def close(self) -> None:
        """Give every session its cache back."""
        for b, writer in enumerate(self.writers):
            writer.stream.cache = split(self.cache, self.mask, b)
        self.cache, self.writers = None, []
