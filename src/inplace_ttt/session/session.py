"""Session: a stream of text with persistent fast weights."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..hf.attach import READING, UNTRAINED, is_trained, runtime_of, unwrap
from ..hf.window import cache_bytes
from .diagnostics import Timeline, harm, measure
from .probe import Probe
from .results import Score as Score
from .results import Stats as Stats
from .results import Studied as Studied
from .sampling import Sampler, Sampling, StopText
from .sources import Readable, texts, token_ids
from .stream import Reader, Stream, losses_of
from .study import study
from .template import Messages, converse
from .text import StreamEncoder
from .writing import check_most, tokens, write
from .writing import end_tokens as end_tokens

STREAM_DECAY = 0.01
"""Decay of a session whose model has none: the plain sum of updates grows without bound (docs/results.md)."""


class Snapshot:
    """A session's state at one moment, for ``restore``."""

    def __init__(self, reader: Reader, stream: Stream, encoder: StreamEncoder | None, timeline: Timeline) -> None:
        self.reader, self.stream, self.encoder, self.timeline = reader, stream, encoder, timeline


class Session:
    """One stream of text that ``model`` reads, writes and learns from, of any length in bounded memory.

    Text is the same text however it is cut: ``read("hel")``, ``read("lo")`` is ``read("hello")``. Characters whose
    token may still change are held until more text comes, or until any other method is called.
    Every token is scored and attended to before any update that saw it. The slow weights are not trained:
    the model does not change, and one model serves many sessions (one call at a time).

    Raises UserError when the model has no fast weights and on settings out of range.

    Args:
        model: an attached model (``inplace_ttt.from_pretrained`` or ``attach``). Several sessions may share it.
        tokenizer: its fast tokenizer; None for token ids only.
        window: layers with full attention see the last ``window`` tokens (three quarters of it just after the window
            has moved); None: as many as the model has positions. Sliding-window layers keep their own window.
        sinks: first tokens that these layers see besides.
        state: form of the fast weights: "dense" (S, [D, F] a layer), "auto" (the pairs of keys and targets while they
            are smaller than S), or a rank r (S is kept to its r leading directions, an approximation).
        probe_every: tokens between two probes of the updates (``timeline``, ``warning``); 0: never. Left out:
            16,384, or 64 chunks if that is more. A probe needs 256 tokens in one call.
        **settings: chunk_size, lr, decay, clip, clip_relative: how the stream is read. Left out, as the model's own
            settings say, except that a model without decay gets ``STREAM_DECAY`` (``decay=0``: the plain sum).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        window: int | None = None,
        sinks: int = 4,
        state: str | int = "dense",
        probe_every: int | None = None,
        **settings: Any,
    ) -> None:
        config = _stream_config(runtime_of(model).config, settings)
        if any(site.projection().split for site in runtime_of(model).sites):
            raise UserError("a session keeps whole fast weights: load its model without tensor parallelism")
        if state not in ("dense", "auto") and not (type(state) is int and state >= 1):
            raise UserError(f'state {state!r}: "dense", "auto" or a rank of at least 1')
        if probe_every is not None and (not isinstance(probe_every, Integral) or probe_every < 0):
            raise UserError(f"probe_every {probe_every}: a number of tokens, 0 for never")
        self.tokenizer = tokenizer
        self.origin: str | None = None
        """Name by which the command line loads the model."""
        self._reader = Reader(model, config, window, sinks, state)
        self._probe = Probe(self._reader, max(16384, 64 * config.chunk_size) if probe_every is None else probe_every)
        self._busy = False
        self._clear()

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, source: Readable, *, scored: bool = False, progress: Any = None, passes: int = 1) -> Score:
        """Read a text, a ``Path``, an open file, an iterator of texts, or token ids; learn from every full chunk.

        Ids [n] or [1, n] are read as they are, after held characters; where a stream begins, the tokenizer's prefix
        (BOS) comes first, unless they begin with it. With ``scored`` the result holds the loss of every token read (of
        held characters: later), else it is empty. ``progress(n)`` is called with the tokens of each piece. ``passes``:
        number of times to read it, each with an empty context and the weights learned so far; losses: the first pass's.

        Raises UserError for what is neither text nor token ids of this model, and where the context is full and cannot
        move on. After an exception (Ctrl-C too) everything read so far stays read and learned.
        """
        if not isinstance(passes, int) or passes < 1:
            raise UserError(f"passes {passes}: 1 or more")
        fed: list[int] = []
        losses: list[float] = []
        with self._exclusive():
            for ids in self._ids(source):
                for n, found in self._feed(ids, scored):
                    losses += found
                    if progress is not None:
                        progress(n)
                fed += ids if scored or passes > 1 else []
            for _ in range(passes - 1):
                if self._encoder is not None and self._encoder.held:
                    ids = self._begin() + self._encoder.flush()
                    losses += [x for _, found in self._feed(ids, scored) for x in found]
                    fed += ids
                self._reader.drop_context(self._stream)
                for n, _ in self._feed(fed, False):
                    if progress is not None:
                        progress(n)
        return Score(tuple(fed) if scored else (), tuple(losses))

    def commit(self) -> bool:
        """Learn what is pending now, as a chunk that is shorter than ``chunk_size``; the next token begins a chunk.

        Return whether anything was pending. Raises UserError unless the objective is "loss".
        """
        if not self._reader.by_loss:
            raise UserError('only objective="loss" can learn from a part of a chunk: choose a smaller chunk_size')
        with self._exclusive():
            self._flush()
            return self._reader.commit(self._stream)

    def study(self, source: Readable, *, minutes: float = 2.0, progress: Any = None) -> Studied:
        """Learn what a text says so that it can be asked for by itself (``ask``), which reading does not do.

        Needs objective "loss". Sentences are learned alone, and questions about them that the model asks and answers
        with the sentence before it (docs/reading.md). Only the fast weights change: the context stays, with what it
        holds; what is pending is learned first. ``minutes``: time limit. ``progress(share, loss)`` is called meanwhile;
        an exception that it raises ends the study, and what was learned until then stays learned.
        """
        with self._exclusive():
            return study(self, source, minutes, progress)

    def score(self, source: Readable) -> Score:
        """Return the losses of a text as continuation, learning on the way; the session itself does not change.

        The text is tokenised on its own: what was read, held characters included, ends before it.
        """
        with self.fork() as copy:
            copy._probe.every = 0
            copy._flush()
            scored = copy.read(source, scored=True)
            with copy._exclusive():
                rest = copy._flush(scored=True)
        return Score(scored.tokens + rest.tokens, scored.losses + rest.losses)

    # -- writing --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[int] | Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Any:
        """Read ``prompt`` and continue; return the new text, or with ``stream`` an iterator over its pieces.

        Greedy unless ``temperature`` is given (further: top_k, top_p, min_p, repetition_penalty, seed). Ends at the
        model's end-of-text token (which is not read), at a ``stop`` string (left out of the text), or after
        ``max_new_tokens``. Generated tokens are part of the stream and learned like those read; to leave the
        session unchanged, generate on a ``fork``. Raises UserError when there is nothing to continue.
        """
        if self.tokenizer is None:
            raise UserError("this session has no tokenizer, so it cannot write text: use generate_ids")
        check_most(max_new_tokens)
        pieces = write(self, prompt, max_new_tokens, StopText(stop), Sampler(Sampling(**sampling)))
        if stream:
            return pieces
        with closing(pieces):
            return "".join(pieces)

    def generate_ids(
        self, prompt: Sequence[int] | Tensor | str | None = None, *, max_new_tokens: int = 256, **sampling: Any
    ) -> list[int]:
        """Generate as ``generate``, in ids; needs no tokenizer if the prompt is ids; no ``stop``, no ``stream``."""
        check_most(max_new_tokens)
        with closing(tokens(self, prompt, max_new_tokens, Sampler(Sampling(**sampling)))) as found:
            return list(found)

    def chat(
        self,
        messages: Messages,
        *,
        learn: Sequence[str] | None = None,
        max_new_tokens: int = 256,
        stream: bool = False,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Any:
        """Read a chat's messages by the tokenizer's chat template and answer, as ``generate`` writes.

        What looks like a special token in the messages is read as text. What the model writes is learned only with
        ``learn="all"`` of the configuration. With objective "loss" what is pending at the end of the turn is learned
        then. Raises UserError where the tokenizer has no chat template.

        Args:
            messages: ``{"role": ..., "content": ...}`` each: those that are new, or the whole chat so far (its
                beginning must then be what was said, the answers as this returned them).
            learn: roles whose messages are learned with objective "loss"; None: all of them.
        """
        check_most(max_new_tokens)
        pieces = converse(self, messages, learn, max_new_tokens, StopText(stop), Sampler(Sampling(**sampling)))
        if stream:
            return pieces
        with closing(pieces):
            return "".join(pieces)

    def ask(self, question: str, *, chat: bool = False, **options: Any) -> Any:
        """Answer from the fast weights alone: the context is dropped first. Options as for ``generate``.

        ``chat``: as a user's message in the tokenizer's chat template. The session does not change.
        What is not yet in the fast weights (with objective "learned" the tokens ``pending`` in ``stats``) cannot be
        remembered; where nothing is in them at all, a warning says so.
        """
        copy = self.fork()  # not in a with statement: with stream=True it generates after this call
        copy.drop_context()
        if not copy.stats().updates:
            size = self._reader.config.chunk_size
            warnings.warn(
                f"nothing has been learned so far (0 updates: a chunk is {size:,} tokens), so the model alone answers: "
                "read more, or use smaller chunks",
                stacklevel=2,
            )
        return (
            copy.chat([{"role": "user", "content": question}], **options)
            if chat
            else copy.generate(question, **options)
        )

    # -- the stream as a thing ------------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """Return an independent session in the same state. Cheap: only what changes is copied, when it changes."""
        self._check_idle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._probe = Probe(self._reader, self._probe.every)
        twin.restore(self.snapshot())
        return twin

    def snapshot(self) -> Snapshot:
        """Return the present state, to come back to with ``restore``."""
        self._check_idle()
        encoder = None if self._encoder is None else self._encoder.fork()
        return Snapshot(self._reader, self._stream.copy(), encoder, self._timeline.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this session or of a fork of it.

        Raises UserError for a snapshot of a session of another model, or with other settings.
        """
        self._check_idle()
        if not self._reader.reads_like(snapshot.reader):
            raise UserError("this snapshot is of a session of another model, or with other settings")
        self._stream = snapshot.stream.copy()
        self._encoder = None if snapshot.encoder is None else snapshot.encoder.fork()
        self._timeline = snapshot.timeline.copy()

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

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, atomically. See ``files``."""
        from .files import save

        self._check_idle()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any = None) -> "Session":
        """Load a session from a file; UserError, with the reason, when it is damaged or belongs to another model."""
        from .files import load

        return load(cls, path, model, tokenizer)

    def export_lora(self, directory: str | Path, rank: int | None = 64) -> Any:
        """Write what was learned as a PEFT LoRA adapter of the base model. See ``lora.export``."""
        from .lora import export

        self._check_idle()
        return export(self, directory, rank)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def next_logits(self) -> Tensor | None:
        """Return logits [V] of the next token in the model's dtype, a copy, after all text so far (held text too).

        None where nothing is in context.
        """
        if self._encoder is None or not self._encoder.held:
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
        """Return a line when the updates look harmful, by the probes, or when the model was never trained."""
        if not is_trained(self._reader.model):
            return UNTRAINED
        return harm(self._timeline, self._settings())

    def diagnostics(self) -> list[Any]:
        """Return ``LayerDiagnostics`` of every adapting layer, now; empty before the first token."""
        return measure(self._reader.model, self._stream.fast, config=self._reader.config)

    def stats(self) -> Stats:
        """Return the session's statistics."""
        stream = self._stream
        held = "" if self._encoder is None else self._encoder.held
        waiting = self._waiting()
        fast = next(iter(stream.fast.values()), None)
        return Stats(
            tokens=stream.tokens + waiting,
            written=stream.written,
            held_characters=len(held),
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
        return f"<Session of {model}: {stands}; window {s.window:,}, chunk_size {s.settings['chunk_size']:,}>"

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._clear()

    def __copy__(self) -> "Session":
        return self.fork()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self._reader.config, name) for name in READING}

    # -- inside ---------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._stream = self._reader.new()
        self._encoder = None if self.tokenizer is None else StreamEncoder(self.tokenizer)
        self._timeline = Timeline(self._probe.every)

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
        """Feed the tokenizer's prefix (BOS), once per stream."""
        if self._stream.started or self._encoder is None:
            return []
        return list(self._encoder.prefix)

    def _waiting(self) -> int:
        """Return the tokens that the held characters would be."""
        if self._encoder is None or not self._encoder.held:
            return 0
        return len(self._begin() + self._encoder.fork().flush())

    def _flush(self, scored: bool = False) -> Score:
        """Turn held characters into tokens: the text ends here."""
        if self._encoder is None or not self._encoder.held:
            return Score((), ())
        ids = self._begin() + self._encoder.flush()
        losses = [x for _, found in self._feed(ids, scored) for x in found]
        return Score(tuple(ids) if scored else (), tuple(losses))

    def _feed(self, ids: list[int], scored: bool, learn: bool = True) -> Iterator[tuple[int, list[float]]]:
        """Feed ids with a probe where one is due; yield each piece's size and (if scored) losses."""
        self._reader.check(ids)
        at = 0
        while at < len(ids):
            end = at + self._probe.before(self._stream, self._timeline, ids, at)
            before = self._stream.logits
            for n, logits in self._reader.feed(self._stream, ids[at:end], scored, learn=learn):
                found: list[float] = []
                if scored:
                    found = losses_of(before, logits, ids[at : at + n])
                    before = logits[-1]
                at += n
                yield n, found

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


def _stream_config(own: InPlaceTTTConfig, settings: dict[str, Any]) -> InPlaceTTTConfig:
    if wrong := sorted(set(settings) - set(READING)):
        raise UserError(f"a session has no setting {', '.join(wrong)}: only window, sinks, state, {', '.join(READING)}")
    given = {name: value for name, value in settings.items() if value is not None or name == "clip"}
    if "decay" not in given and not own.decay:
        given["decay"] = STREAM_DECAY
    return replace(own, **given)
