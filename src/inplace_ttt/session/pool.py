"""Many sessions on one model, writing in one batch."""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..hf.attach import inspect
from ..hf.rows import merge, split
from .sampling import Sampler, Sampling, StopText
from .session import Session
from .stream import Reader, Stream, whole
from .text import StreamDecoder
from .writing import check_continuable, check_most, end_tokens, read_prompt


class SessionPool:
    """Sessions by name that share a model and settings. ``generate`` takes their decode steps in one batch.

    Each session writes what it would write alone (to rounding: the same products in a batch of another size). They may
    differ in everything: length, tokens pending, context, weights. ``batch``: the most rows of one step; further
    sessions wait until another has finished. Options as for ``Session``; ``state="auto"`` or a rank makes idle and
    active sessions smaller.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, batch: int = 32, **options: Any) -> None:
        if batch < 1:
            raise UserError(f"batch {batch}: at least 1")
        self.batch = batch
        self._blank = Session(model, tokenizer, **options)
        self._sessions: dict[str, Session] = {}

    # -- a mapping of sessions ------------------------------------------------------------------------------------

    def open(self, name: str) -> Session:
        """The session ``name``, a new one if there is none."""
        if name not in self._sessions:
            self._sessions[name] = self._blank.fork()
        return self._sessions[name]

    def add(self, name: str, session: Session) -> Session:
        """Takes in a session (a fork of another one, say).

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
        """A copy of the session ``name`` under a new name."""
        return self.add(new, self[name].fork())

    def load(self, name: str, path: str | Path) -> Session:
        """A session from a file."""
        return self.add(name, Session.load(path, self._blank._reader.model, self._blank.tokenizer))

    def close(self, name: str) -> None:
        """Forgets a session."""
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
        """Bytes that all sessions hold; tensors that forks share are counted for each of them."""
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
        """Continues several sessions: a prompt (or None) by name, or names alone. Options as for ``Session.generate``.

        Returns the new texts by name; with ``stream`` an iterator over (name, piece) as they come. Sessions without a
        tokenizer give lists of ids. Sessions that a name does not find are opened.

        Raises UserError, before any session has read or written anything, where one is busy or has nothing to continue.
        After another exception (a prompt that cannot be read, Ctrl-C) every session keeps what it read and wrote.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts by name, or a list of names, not a text: [{prompts!r}]")
        wanted = dict(prompts) if isinstance(prompts, Mapping) else dict.fromkeys(prompts)
        check_most(max_new_tokens)
        settings, stops = Sampling(**sampling), StopText(stop).stops
        jobs = [_Job(n, self.open(n), p, max_new_tokens, stops, settings) for n, p in wanted.items()]
        pieces = self._run(jobs)
        if stream:
            return pieces
        found: dict[str, Any] = {job.name: [] if job.session.tokenizer is None else "" for job in jobs}
        with closing(pieces):
            for name, piece in pieces:
                found[name] += piece
        return found

    def _run(self, jobs: list["_Job"]) -> Generator[tuple[str, Any], None, None]:
        with ExitStack() as stack:
            for job in jobs:
                stack.enter_context(job.session._exclusive())
            for job in jobs:
                check_continuable(job.session, job.prompt)
            waiting = list(reversed(jobs))
            active: list[_Job] = []
            with closing(_Groups(self._blank._reader)) as batch:
                while waiting or active:
                    while waiting and len(active) < self.batch:
                        job = waiting.pop()
                        job.begin()
                        active.append(job)
                    for job in list(active):
                        if piece := job.choose():
                            yield job.name, piece
                        if job.done:
                            active.remove(job)
                            if piece := job.finish():
                                yield job.name, piece
                    if active:
                        batch.step([job.session._stream for job in active], [job.token for job in active])
                        for job in active:
                            job.fed()


class _Job:
    """One session's turn: its prompt, and the tokens it chooses."""

    def __init__(
        self, name: str, session: Session, prompt: Any, most: int, stops: Sequence[str], settings: Sampling
    ) -> None:
        self.name, self.session, self.prompt, self.left = name, session, prompt, most
        self.sampler, self.stops = Sampler(settings), StopText(stops)
        self.decoder: StreamDecoder | None = None
        self.token, self.done = -1, False
        self.started = False

    def begin(self) -> None:
        read_prompt(self.session, self.prompt)
        self.ends = end_tokens(self.session._reader.root, self.session.tokenizer)

    def choose(self) -> Any:
        """Text of the token fed last; then chooses the next one, or sets ``done``."""
        piece: Any = self._show()
        stream = self.session._stream
        if self.stops.found or self.left == 0:
            self.done = True
            return piece
        assert stream.logits is not None
        self.token = self.sampler(stream.recent, stream.logits)
        self.done = self.token in self.ends
        return piece

    def _show(self) -> Any:
        if not self.started:
            return ""
        if self.session.tokenizer is None:
            return [self.token]
        self.decoder = self.decoder or StreamDecoder(self.session.tokenizer, self.session._stream.recent[-9:-1])
        return self.stops.push(self.decoder.push(self.token))

    def fed(self) -> None:
        self.left -= 1
        self.started = True
        self.session._stream.written += 1

    def finish(self) -> str:
        if self.decoder is None or self.stops.found:
            return ""
        return self.stops.push(self.decoder.flush()) + self.stops.flush()


class _Groups:
    """One batch for streams whose state is S, one for those whose state is still pairs: neither costs the other."""

    def __init__(self, reader: Reader) -> None:
        self.batches = (_Batch(reader), _Batch(reader))
        config = reader.config
        sizes = [D * F / (D + F) for D, F in (info.shape for info in inspect(reader.model))]
        self.chunk_size, self.most = config.chunk_size, min(sizes) if reader.form == "auto" else math.inf

    def step(self, streams: list[Stream], tokens: list[int]) -> None:
        """Feed one token to each stream."""
        reader = self.batches[0].reader
        if reader.by_loss:  # a chunk that is complete is run again from its own context: one after another
            for stream, token in zip(streams, tokens, strict=True):
                for _ in reader.feed(stream, [token], learn=reader.config.learn == "all"):
                    pass
            return
        groups: tuple[list[int], list[int]] = ([], [])
        for i, stream in enumerate(streams):
            groups[self._dense_next(stream)].append(i)
        for batch, group in zip(self.batches, groups, strict=True):
            batch.keep([streams[i] for i in group])  # all of them first: a stream may move from one to the other
        for batch, group in zip(self.batches, groups, strict=True):
            if group:
                batch.step([streams[i] for i in group], [tokens[i] for i in group])

    def _dense_next(self, stream: Stream) -> bool:
        """Whether the pairs are too many when the present chunk is complete."""
        return (stream.tokens // self.chunk_size + 1) * self.chunk_size >= self.most

    def close(self) -> None:
        """Gives every stream its cache back."""
        for batch in self.batches:
            batch.close()


class _Batch:
    """Streams whose caches lie side by side in one, for as long as the same ones take part."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.streams: list[Stream] = []
        self.cache: Any = None
        self.mask: Tensor = torch.zeros(0, 0, dtype=torch.int64)

    def keep(self, streams: list[Stream]) -> None:
        """Lets go of the streams unless these same ones go on, with room for one more token."""
        same = len(streams) == len(self.streams) and all(a is b for a, b in zip(streams, self.streams, strict=True))
        if not same or any(self.reader.room(stream) <= 0 for stream in streams):
            self.close()

    def step(self, streams: list[Stream], tokens: list[int]) -> None:
        """Feeds one token to each stream. ``keep`` comes first."""
        if self.cache is None:
            for stream in streams:
                self.reader.make_room(stream)
            self.cache, self.mask = merge([stream.cache for stream in streams], self.reader.root.config)
            self.streams = list(streams)
        mask = torch.cat([self.mask, torch.ones(len(streams), 1, dtype=torch.int64)], 1)
        positions = torch.tensor([[stream.position] for stream in streams])
        with whole(self.cache):
            logits = self.reader.call(self.cache, torch.tensor(tokens)[:, None], positions, mask)
        self.mask = mask
        for stream, token, row in zip(streams, tokens, logits, strict=True):
            self.reader.advance(stream, [token], row[-1])

    def close(self) -> None:
        """Gives every stream its cache back."""
        if self.cache is not None:
            for b, stream in enumerate(self.streams):
                stream.cache = split(self.cache, self.mask, b)
        self.cache, self.streams = None, []
