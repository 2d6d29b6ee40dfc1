"""Session: a stream of text with persistent fast weights."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import InPlaceTTTConfig
from ..errors import UserError
from ..hf.attach import READING, runtime_of
from .files import load, save
from .lora import export
from .sources import Readable
from .state import Score, SessionState
from .stream import Reader
from .study import Studied, study
from .template import Messages, Template, converse
from .writing import Writer, write

STREAM_DECAY = 0.01
"""Decay of a session whose model has none: the plain sum of updates grows without bound (docs/results.md)."""


class Session(SessionState):
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
        self.origin = None
        self._reader = Reader(model, config, window, sinks, state)
        self._probe_every = max(16384, 64 * config.chunk_size) if probe_every is None else int(probe_every)
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
                ended = self._flush(True)
                losses += ended.losses if scored else ()
                fed += ended.tokens
                self._reader.drop_context(self._stream)
                for n, _ in self._feed(fed, False):
                    if progress is not None:
                        progress(n)
        return Score(tuple(fed) if scored else (), tuple(losses))

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
            copy._probe_every = 0
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
        pieces = write(Writer(self, max_new_tokens, stop, sampling), prompt)
        return pieces if stream else "".join(pieces)

    def generate_ids(
        self, prompt: Sequence[int] | Tensor | str | None = None, *, max_new_tokens: int = 256, **sampling: Any
    ) -> list[int]:
        """Generate as ``generate``, in ids; needs no tokenizer if the prompt is ids; no ``stop``, no ``stream``."""
        writer = Writer(self, max_new_tokens, sampling=sampling, as_ids=True)
        with closing(write(writer, prompt)) as pieces:
            for _ in pieces:
                pass
        return writer.ids

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
        template = Template.of(self)  # first: it says where an answer ends
        pieces = converse(template, Writer(self, max_new_tokens, stop, sampling), messages, learn)
        return pieces if stream else "".join(pieces)

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
        if chat:
            return copy.chat([{"role": "user", "content": question}], **options)
        return copy.generate(question, **options)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the session to one safetensors file, atomically. See ``files``."""
        self._check_idle()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module, tokenizer: Any = None) -> "Session":
        """Load a session from a file; UserError, with the reason, when it is damaged or belongs to another model."""
        return load(cls, path, model, tokenizer)

    def export_lora(self, directory: str | Path, rank: int | None = 64) -> Any:
        """Write what was learned as a PEFT LoRA adapter of the base model. See ``lora.export``."""
        self._check_idle()
        return export(self, directory, rank)


def _stream_config(own: InPlaceTTTConfig, settings: dict[str, Any]) -> InPlaceTTTConfig:
    if wrong := sorted(set(settings) - set(READING)):
        raise UserError(f"a session has no setting {', '.join(wrong)}: only window, sinks, state, {', '.join(READING)}")
    given = {name: value for name, value in settings.items() if value is not None or name == "clip"}
    if "decay" not in given and not own.decay:
        given["decay"] = STREAM_DECAY
    return replace(own, **given)
