"""A session's state, and how text becomes tokens that a model reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from torch import Tensor

from ..errors import UserError
from ..hf.attach import READING, UNTRAINED, is_trained, unwrap
from ..hf.window import cache_bytes
from .diagnostics import Timeline, harm, measure
from .sources import Readable, texts, token_ids
from .stream import DETACHED, Reader, Stream, losses_of
from .text import StreamEncoder

PROBE = 256
"""Tokens that a probe scores with and without updates."""


@dataclass(frozen=True)
class Snapshot:
    """A session's state at one moment, for ``restore``."""

    reader: Reader
    stream: Stream
    encoder: StreamEncoder | None
    timeline: Timeline

    def copy(self) -> "Snapshot":
        """Return an independent copy. Cheap: tensors that are only ever replaced are shared."""
        encoder = None if self.encoder is None else self.encoder.fork()
        return replace(self, stream=self.stream.copy(), encoder=encoder, timeline=self.timeline.copy())


@dataclass(frozen=True)
class Score:
    """``tokens`` [n]: ids of a text, BOS included; ``losses``: -log p in nats of each.

    A stream's first token has no context and so no loss: then ``losses`` has one entry less.
    """

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return nats per scored token; nan when there is none."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")


@dataclass(frozen=True)
class Stats:
    """Statistics of a session. ``bytes_*`` are memory held; ``pending`` tokens wait for their chunk to fill up."""

    tokens: int
    written: int
    held_characters: int
    updates: int
    pending: int
    in_context: int
    bytes_context: int
    bytes_fast_weights: int
    window: int
    sinks: int
    settings: dict[str, Any]
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class SessionState:
    """State of a session, and the feeding of tokens: what its other modules use of ``Session``, which documents it."""

    tokenizer: Any
    origin: str | None
    """Name by which the command line loads the model."""
    _reader: Reader
    _stream: Stream
    _encoder: StreamEncoder | None
    _timeline: Timeline
    _probe_every: int
    _busy: bool

    @property
    def learns_by_loss(self) -> bool:
        """True if the model's objective is the loss: what is pending can be learned at any time (``commit``)."""
        return self._reader.by_loss

    # -- the stream as a thing ------------------------------------------------------------------------------------

    def fork(self) -> Self:
        """Return an independent session in the same state. Cheap: only what changes is copied, when it changes."""
        self._check_idle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.restore(self.snapshot())
        return twin

    def snapshot(self) -> Snapshot:
        """Return the present state, to come back to with ``restore``."""
        self._check_idle()
        return Snapshot(self._reader, self._stream, self._encoder, self._timeline).copy()

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session or of a fork of it.

        Raises UserError for a snapshot of a session of another model, or with other settings.
        """
        self._check_idle()
        if not self._reader.reads_like(snapshot.reader):
            raise UserError("this snapshot is of a session of another model, or with other settings")
        own = snapshot.copy()
        self._stream, self._encoder, self._timeline = own.stream, own.encoder, own.timeline

    def reset(self) -> None:
        """Forget everything: a new document begins."""
        self._check_idle()
        self._clear()

    def drop_context(self) -> None:
        """Make attention forget all tokens; the fast weights keep what they learned. What is read next begins with BOS.

        With objective "loss", what is pending is learned first.
        """
        with self._exclusive():
            if not self._reader.fits(self._stream, self._waiting()):
                self._reader.drop_context(self._stream)  # else the held characters could not be read
            self._flush()
            self._reader.drop_context(self._stream)

    def commit(self) -> bool:
        """Learn what is pending now, as a chunk that is shorter than ``chunk_size``; the next token begins a chunk.

        Return whether anything was pending. Raises UserError unless the objective is "loss".
        """
        if not self.learns_by_loss:
            raise UserError('only objective="loss" can learn from a part of a chunk: choose a smaller chunk_size')
        with self._exclusive():
            self._flush()
            return self._reader.commit(self._stream)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def next_logits(self) -> Tensor | None:
        """Return logits [V] of the next token in the model's dtype, a copy, after all text so far (held text too).

        None where nothing is in context.
        """
        if not self._held:
            return None if self._stream.logits is None else self._stream.logits.clone()
        with self.fork() as copy:
            copy._flush()
            return copy._stream.logits

    @property
    def fast_weights(self) -> dict[int, Any]:
        """Fast weights by layer."""
        return self._stream.fast

    @property
    def timeline(self) -> Timeline:
        """Samples of the probes."""
        return self._timeline

    @property
    def warning(self) -> str | None:
        """Return a line when the updates look harmful, by the probes, or the model was never trained or is detached."""
        if not self._reader.is_attached:
            return DETACHED
        if not is_trained(self._reader.model):
            return UNTRAINED
        return harm(self._timeline, self._settings())

    def diagnostics(self) -> list[Any]:
        """Return ``LayerDiagnostics`` of every adapting layer, now; empty before the first token."""
        self._reader.check_attached()
        return measure(self._reader.model, self._stream.fast, config=self._reader.config)

    def stats(self) -> Stats:
        """Return the session's statistics."""
        stream = self._stream
        waiting = self._waiting()
        fast = next(iter(stream.fast.values()), None)
        return Stats(
            tokens=stream.tokens + waiting,
            written=stream.written,
            held_characters=len(self._held),
            updates=0 if fast is None else fast.updates[0],
            pending=(0 if fast is None else fast.seen[0] % fast.chunk_size) + waiting,
            in_context=stream.cached if self._reader.own_window is None else min(stream.cached, self._reader.window),
            bytes_context=cache_bytes(stream.cache),
            bytes_fast_weights=sum(x.nbytes for x in stream.fast.values()),
            window=self._reader.window,
            sinks=self._reader.sinks,
            settings=self._settings(),
            warning=self.warning,
        )

    def __repr__(self) -> str:
        s, model = self.stats(), type(unwrap(self._reader.model)).__name__
        stands = f"{s.tokens:,} tokens, {s.updates:,} updates, {s.pending:,} tokens pending"
        stands += "" if self._reader.is_attached else "; the model was detached"
        return f"<Session of {model}: {stands}; window {s.window:,}, chunk_size {s.settings['chunk_size']:,}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    __copy__ = fork

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self._reader.config, name) for name in READING}

    # -- inside ---------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._stream = self._reader.new()
        self._encoder = None if self.tokenizer is None else StreamEncoder(self.tokenizer)
        self._timeline = Timeline(self._probe_every)

    def _ids(self, source: Readable) -> Iterator[list[int]]:
        """Yield the token ids of a source, settled piece by piece."""
        if (ids := token_ids(source)) is not None:
            self._reader.check(ids)
            if ids:
                held = [] if self._encoder is None else self._encoder.flush()
                prefix = self._begin()
                yield held + ids if not held and ids[: len(prefix)] == prefix else prefix + held + ids
            return
        if self._encoder is None:
            raise UserError("this session has no tokenizer: read token ids, or make it with one")
        for text in texts(source):
            ids = self._encoder.push(text)
            if ids:
                yield self._begin() + ids

    def _begin(self) -> list[int]:
        """Return the tokenizer's prefix (BOS), which is fed once per stream."""
        if self._stream.started or self._encoder is None:
            return []
        return list(self._encoder.prefix)

    @property
    def _held(self) -> str:
        """Characters that were given and are not tokens yet."""
        return "" if self._encoder is None else self._encoder.held

    def _waiting(self) -> int:
        """Return the tokens that the held characters would be."""
        return len(self._begin() + self._encoder.fork().flush()) if self._encoder and self._held else 0

    def _flush(self, scored: bool = False) -> Score:
        """Turn held characters into tokens: the text ends here."""
        ids = self._begin() + self._encoder.flush() if self._encoder and self._held else []
        losses = self._feed_all(ids, scored)
        return Score(tuple(ids) if scored else (), tuple(losses))

    def _feed_all(self, ids: list[int], scored: bool = False, learn: bool = True) -> list[float]:
        """Feed ids; return their losses if ``scored``."""
        return [loss for _, losses in self._feed(ids, scored, learn) for loss in losses]

    def _feed(self, ids: list[int], scored: bool, learn: bool = True) -> Iterator[tuple[int, list[float]]]:
        """Feed ids with a probe where one is due; yield each piece's size and (if scored) losses."""
        self._reader.check(ids)
        at = 0
        while at < len(ids):
            end = at + self._probe(ids, at)
            before = self._stream.logits
            for n, logits in self._reader.feed(self._stream, ids[at:end], scored, learn=learn):
                found: list[float] = []
                if scored:
                    found = losses_of(before, logits, ids[at : at + n])
                    before = logits[-1]
                at += n
                yield n, found

    def _probe(self, ids: Sequence[int], at: int) -> int:
        """Take a sample before the ids from ``at`` on are fed, if one is due and as many ids are there.

        Return how many ids may be fed before the next call.
        """
        rest = len(ids) - at
        if not self._probe_every:
            return rest
        stream, timeline = self._stream, self._timeline
        if timeline.due(stream.tokens) and rest >= PROBE and self._reader.fits(stream, PROBE):
            losses = self._reader.losses_on_and_off(stream, ids[at : at + PROBE])
            timeline.append(stream.tokens, self.diagnostics(), *losses)
        return min(rest, max(timeline.next - stream.tokens, PROBE))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self._check_idle()
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check_idle(self) -> None:
        if self._busy:
            raise UserError(
                "this session is reading or writing: exhaust or close the iterator that generate(stream=True) gave"
            )
