"""Session: a stream that a model keeps learning from."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..hf.attach import READING, runtime_of
from ..hf.window import cache_bytes
from .diagnostics import Timeline, harm, measure
from .probe import Probe
from .sampling import Sampler, Sampling, StopText
from .stream import Reader, Stream
from .text import StreamDecoder, StreamEncoder

STREAM_DECAY = 0.01
"""Decay of a session whose model has none: the plain sum of updates grows without bound (docs/results.md)."""

Readable = str | Path | IO[Any] | Iterable[str] | Sequence[int] | Tensor


@dataclass(frozen=True)
class Score:
    """``losses`` [n]: -log p in nats of every token of a text that has something before it; ``tokens``: their ids."""

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Nats per scored token; nan when there is none."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")


@dataclass(frozen=True)
class Stats:
    """Where a session stands. ``bytes_*`` are memory held; ``pending`` tokens wait for their chunk to fill up."""

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
        """For JSON."""
        return asdict(self)


class Snapshot:
    """A session's state at one moment, for ``restore``."""

    def __init__(self, stream: Stream, encoder: StreamEncoder | None, timeline: Timeline) -> None:
        self.stream, self.encoder, self.timeline = stream, encoder, timeline


class Session:
    """One stream of text that ``model`` reads, writes and learns from, of any length in bounded memory.

    model: an attached model (``inplace_ttt.from_pretrained`` or ``attach``). Several sessions may share it.
    tokenizer: its fast tokenizer; None for token ids only.
    window, sinks: layers with full attention see the last ``window`` tokens (three quarters of it just after the window
        has moved on) and the first ``sinks``; None: as many as the model has positions. Sliding-window layers keep
        their own window.
    chunk_size, lr, decay, clip, clip_relative: how the stream is read; left out, as the model's own settings say,
        except that a model without decay gets ``STREAM_DECAY`` (pass ``decay=0`` for the plain sum).
    state: form of the fast weights: "dense" (S, [D, F] a layer), "auto" (the pairs of keys and targets while they are
        smaller than S), or a rank r (S is kept to its r leading directions, an approximation).
    probe_every: tokens between two looks at what the updates did (``timeline``, ``warning``); 0: never. Left out:
        16,384, or 64 chunks if that is more.

    Text is the same text however it is cut: ``read("hel")``, ``read("lo")`` is ``read("hello")``. Characters whose
    token may still change are held until more text comes, or until something else than reading is asked for.
    Every token is scored and attended to before any update that saw it. Nothing here is trained by gradient descent on
    the slow weights: the model is as it was, and one model serves many sessions (one call at a time).

    Raises UserError when the model has no fast weights and on settings out of range.
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
        if state not in ("dense", "auto") and not (isinstance(state, int) and state >= 1):
            raise UserError(f'state {state!r}: "dense", "auto" or a rank of at least 1')
        self.tokenizer = tokenizer
        self.origin: str | None = None
        """Name by which the command line finds the model again."""
        self._reader = Reader(model, config, window, sinks, state)
        self._stream = self._reader.new()
        self._encoder = None if tokenizer is None else StreamEncoder(tokenizer)
        every = max(16384, 64 * config.chunk_size) if probe_every is None else probe_every
        self._probe = Probe(self._reader, every)
        self._timeline = Timeline(every)
        self._busy = False

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, source: Readable, *, scored: bool = False, progress: Any = None) -> Score:
        """Reads a text, a ``Path``, an open file, an iterator of texts, or token ids; learns from every full chunk.

        With ``scored`` the result holds the loss of every token read (of held characters: later), else it is empty.
        ``progress(n)`` is called with the tokens of each piece. After an exception (Ctrl-C too) everything read so far
        stays read and learned.
        """
        tokens: list[int] = []
        losses: list[float] = []
        with self._exclusive():
            for ids in self._ids(source):
                for n, found in self._feed(ids, scored):
                    tokens += ids[:n] if scored else []
                    ids = ids[n:]
                    losses += found
                    if progress is not None:
                        progress(n)
        return Score(tuple(tokens), tuple(losses))

    def score(self, source: Readable) -> Score:
        """Loss of a text as the continuation of what was read, learning on the way; the session stays as it was."""
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
        """Reads ``prompt`` and continues; returns the new text, or with ``stream`` an iterator over its pieces.

        Greedy unless ``temperature`` is given (further: top_k, top_p, min_p, repetition_penalty, seed). Ends at the
        model's end-of-text token (which is not read), at a ``stop`` string (left out of the text), or after
        ``max_new_tokens``. What is written is part of the stream and learned from like what is read; to leave no
        trace, generate on a ``fork``. Raises UserError when there is nothing to continue.
        """
        if self.tokenizer is None:
            raise UserError("this session has no tokenizer, so it cannot write text: use generate_ids")
        pieces = self._write(prompt, max_new_tokens, (stop,) if isinstance(stop, str) else stop, Sampling(**sampling))
        return pieces if stream else "".join(pieces)

    def generate_ids(
        self, prompt: Sequence[int] | Tensor | str | None = None, *, max_new_tokens: int = 256, **sampling: Any
    ) -> list[int]:
        """As ``generate``, in token ids."""
        with closing(self._tokens(prompt, max_new_tokens, Sampler(Sampling(**sampling)))) as tokens:
            return list(tokens)

    def ask(self, question: str, **options: Any) -> str:
        """Answers from the fast weights alone: the context is dropped first. Options as for ``generate``.

        The session stays as it was, whatever is asked. What is not yet in the fast weights (the tokens ``pending`` in
        ``stats``) cannot be remembered.
        """
        with self.fork() as copy:
            copy.drop_context()
            return copy.generate(question, **options)  # type: ignore[no-any-return]

    # -- the stream as a thing ------------------------------------------------------------------------------------

    def fork(self) -> "Session":
        """An independent session in the same state. Cheap: only what changes is copied, when it changes."""
        self._check_idle()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._probe = Probe(self._reader, self._probe.every)
        twin.restore(self.snapshot())
        return twin

    def snapshot(self) -> Snapshot:
        """The present state, to come back to with ``restore``."""
        self._check_idle()
        encoder = None if self._encoder is None else self._encoder.fork()
        return Snapshot(self._stream.copy(), encoder, self._timeline.copy())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of this session or of a fork of it."""
        self._check_idle()
        self._stream = snapshot.stream.copy()
        self._encoder = None if snapshot.encoder is None else snapshot.encoder.fork()
        self._timeline = snapshot.timeline.copy()

    def reset(self) -> None:
        """Forgets everything: a new document begins."""
        self._check_idle()
        self._stream = self._reader.new()
        self._encoder = None if self.tokenizer is None else StreamEncoder(self.tokenizer)
        self._timeline = Timeline(self._probe.every)

    def drop_context(self) -> None:
        """Attention forgets all tokens; the fast weights keep what they learned."""
        with self._exclusive():
            self._flush()
            self._reader.drop_context(self._stream)

    def save(self, path: str | Path) -> None:
        """Writes the session to one safetensors file, atomically. See ``files``."""
        from .files import save

        self._check_idle()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any = None) -> "Session":
        """A session from a file; UserError, with the reason, when it is damaged or belongs to another model."""
        from .files import load

        return load(path, model, tokenizer)

    def export_lora(self, directory: str | Path, rank: int | None = None) -> Any:
        """Writes what was learned as a PEFT LoRA adapter of the base model. See ``lora.export``."""
        from .lora import export

        self._check_idle()
        return export(self, directory, rank)

    # -- looking --------------------------------------------------------------------------------------------------

    @property
    def next_logits(self) -> Tensor | None:
        """[V]: prediction of the next token, with all text read so far (held characters too)."""
        if self._encoder is None or not self._encoder.held:
            return self._stream.logits
        with self.fork() as copy:
            copy._flush()
            return copy._stream.logits

    @property
    def fast_weights(self) -> dict[int, Any]:
        """Fast weights by layer."""
        return self._stream.fast

    @property
    def timeline(self) -> Timeline:
        """What the probes saw."""
        return self._timeline

    @property
    def warning(self) -> str | None:
        """One line when the updates look harmful, by the probes."""
        return harm(self._timeline, self._settings())

    def diagnostics(self) -> list[Any]:
        """``LayerDiagnostics`` of every adapting layer, now."""
        return measure(self._reader.model, self._stream.fast, config=self._reader.config)

    def stats(self) -> Stats:
        """Where the session stands."""
        stream = self._stream
        held = "" if self._encoder is None else self._encoder.held
        waiting = len(self._encoder.fork().flush()) if self._encoder is not None and held else 0
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

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._stream = self._reader.new()

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self._reader.config, name) for name in READING}

    # -- inside ---------------------------------------------------------------------------------------------------

    def _ids(self, source: Readable) -> Iterator[list[int]]:
        """Token ids of a source, settled piece by piece."""
        if isinstance(source, Tensor) or (isinstance(source, Sequence) and not isinstance(source, str)):
            ids = _token_ids(source)
            if ids is not None:
                yield self._begin() + ([] if self._encoder is None else self._encoder.flush()) + ids
                return
        if self._encoder is None:
            raise UserError("this session has no tokenizer: read token ids, or make it with one")
        for text in _texts(source):
            ids = self._encoder.push(text)
            if ids:
                yield self._begin() + ids

    def _begin(self) -> list[int]:
        """The tokenizer's prefix, once a stream."""
        if self._stream.started or self._encoder is None:
            return []
        return list(self._encoder.prefix)

    def _flush(self, scored: bool = False) -> Score:
        """Turns held characters into tokens: the text ends here."""
        if self._encoder is None or not self._encoder.held:
            return Score((), ())
        ids = self._begin() + self._encoder.flush()
        losses = [x for _, found in self._feed(ids, scored) for x in found]
        return Score(tuple(ids) if scored else (), tuple(losses))

    def _feed(self, ids: list[int], scored: bool) -> Iterator[tuple[int, list[float]]]:
        """Feeds ids with a probe where one is due; yields each piece's size and (if scored) losses."""
        while ids:
            self._stream.started = True
            span = self._probe.before(self._stream, self._timeline, ids)
            part, ids = ids[:span], ids[span:]
            before = self._stream.logits
            at = 0
            for n, logits in self._reader.feed(self._stream, part, scored):
                found: list[float] = []
                if scored:
                    found = _losses(before, logits, part[at : at + n])
                    before = logits[-1]
                at += n
                yield n, found

    def _write(self, prompt: Any, most: int, stop: Sequence[str], settings: Sampling) -> Iterator[str]:
        sampler, stops = Sampler(settings), StopText(stop)
        decoder: StreamDecoder | None = None
        with closing(self._tokens(prompt, most, sampler)) as tokens:
            for token in tokens:
                decoder = decoder or StreamDecoder(self.tokenizer, self._stream.recent[-9:-1])
                if text := stops.push(decoder.push(token)):
                    yield text
                if stops.found:
                    return
        if text := stops.push("" if decoder is None else decoder.flush()) + stops.flush():
            yield text

    def _tokens(self, prompt: Any, most: int, sampler: Sampler) -> Generator[int, None, None]:
        """The new tokens, each read before it is given."""
        if most < 0:
            raise UserError(f"max_new_tokens {most}: 0 or more")
        with self._exclusive():
            self._read_prompt(prompt)
            ends = end_tokens(self._reader.root, self.tokenizer)
            for _ in range(most):
                logits = self._stream.logits
                assert logits is not None
                token = sampler(self._stream.recent, logits)
                if token in ends:
                    return
                for _piece in self._reader.feed(self._stream, [token]):
                    self._stream.written += 1
                yield token

    def _read_prompt(self, prompt: Any) -> None:
        for ids in () if prompt is None else self._ids(prompt):
            for _ in self._feed(ids, False):
                pass
        self._flush()
        if self._stream.logits is None and (ids := self._begin()):
            for _ in self._feed(ids, False):
                pass
        if self._stream.logits is None:
            raise UserError("nothing to continue: read something first, or give a prompt")

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
            raise UserError("this session is writing: exhaust or close the iterator that generate(stream=True) gave")


def _stream_config(own: InPlaceTTTConfig, settings: dict[str, Any]) -> InPlaceTTTConfig:
    if wrong := sorted(set(settings) - set(READING)):
        raise UserError(f"a session has no setting {', '.join(wrong)}: only window, sinks, state, {', '.join(READING)}")
    given = {name: value for name, value in settings.items() if value is not None or name == "clip"}
    if "decay" not in given and not own.decay:
        given["decay"] = STREAM_DECAY
    return replace(own, **given)


def _token_ids(source: Any) -> list[int] | None:
    """A flat list of ids, or None when ``source`` holds texts."""
    if isinstance(source, Tensor):
        if source.is_floating_point() or source.dim() > 2 or (source.dim() == 2 and source.shape[0] != 1):
            raise UserError(f"token ids must be integers in one row, got {tuple(source.shape)} {source.dtype}")
        return [int(i) for i in source.flatten().tolist()]
    if all(isinstance(i, int) for i in source):
        return list(source)
    return None


def _texts(source: Any) -> Iterator[str]:
    if isinstance(source, str):
        yield source
        return
    if isinstance(source, Path):
        with open(source, encoding="utf-8-sig") as file:
            yield from _texts(file)
        return
    if hasattr(source, "read"):
        while block := source.read(1 << 18):
            yield _text(block)
        return
    for block in source:
        yield _text(block)


def _text(block: Any) -> str:
    if not isinstance(block, str):
        raise UserError(f"expected text, got {type(block).__name__}: open files in text mode")
    return block


def _losses(before: Tensor | None, logits: Tensor, ids: Sequence[int]) -> list[float]:
    """-log p of ids [n], each by the logits of the token before it; the stream's first token has none."""
    rows = logits[:-1] if before is None else torch.cat([before[None], logits[:-1]])
    if not len(rows):
        return []
    wanted = torch.tensor(list(ids)[len(ids) - len(rows) :], device=rows.device)
    found: list[float] = nn.functional.cross_entropy(rows.float(), wanted, reduction="none").tolist()
    return found


def end_tokens(root: Any, tokenizer: Any) -> set[int]:
    """Ids that end a text."""
    own = getattr(getattr(root, "generation_config", None), "eos_token_id", None)
    ids = [own if own is not None else root.config.get_text_config().eos_token_id]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    flat = [i for x in ids for i in (x if isinstance(x, list | tuple) else [x])]
    return {int(i) for i in flat if i is not None}
