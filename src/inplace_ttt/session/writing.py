"""Generation: sample a token, feed it, yield it."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from torch import Tensor

from ..errors import UserError
from .sampling import Sampler, Sampling, StopText
from .state import SessionState
from .stream import Stream, is_count
from .text import StreamDecoder

NOTHING = "nothing to continue: read something first, or give a prompt"


class Writer:
    """One session that is generating: the tokens it samples, and their text.

    ``choose`` takes ``token``, which is read next, from ``logits`` [V], on the model's device; ``was_read`` adds it to
    ``ids``, and what it shows to ``piece``: the text (without a tokenizer: the ids) that has not been given out yet,
    "" for none. ``finished`` is None, "stop" (end of text, or a stop string), "length", or "error" with ``error``.

    Raises UserError on settings out of range.
    """

    def __init__(
        self,
        session: SessionState,
        most: int,
        stop: str | Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
        *,
        learn: bool | None = None,
        as_ids: bool = False,
    ) -> None:
        if not is_count(most, 0):
            raise UserError(f"max_new_tokens {most!r}: a whole number, 0 or more")
        self.session, self.left = session, most
        self.learn = session._reader.config.learn == "all" if learn is None else learn
        if unknown := sorted(set(sampling or {}) - {f.name for f in fields(Sampling)}):
            known = ", ".join(f.name for f in fields(Sampling))
            raise UserError(f"sampling has no option {', '.join(unknown)}: only {known}")
        self.sampler, self.stops = Sampler(Sampling(**sampling or {})), StopText(stop)
        self.as_ids = as_ids or session.tokenizer is None
        self.decoder: StreamDecoder | None = None
        self.ends = end_tokens(session._reader.root, session.tokenizer) | session._reader.ends
        self.token: int | None = None
        self.logits: Tensor | None = None
        self.ids: list[int] = []
        self.piece: Any = ""
        self.finished: str | None = None
        self.error: UserError | None = None
        self.held = ExitStack()
        """Keeps others from using the session meanwhile."""

    @property
    def stream(self) -> Stream:
        """The session's stream."""
        return self.session._stream

    def choose(self, logits: Tensor, token: int | None = None) -> None:
        """Take the next token (None: sample it from logits [V]), or finish."""
        if self.left == 0:
            return self._finish("length")
        try:
            self.logits, self.token = logits, self.sampler(self.stream.recent, logits) if token is None else token
        except UserError as error:
            return self.fail(error)
        return self._finish("stop") if self.token in self.ends else None

    def was_read(self) -> None:
        """Count the token as part of the session, and show it."""
        assert self.token is not None
        self.left -= 1
        self.ids.append(self.token)
        self.stream.written += 1
        if self.as_ids:
            self.piece = [self.token]
            return
        self.decoder = self.decoder or StreamDecoder(self.session.tokenizer, self.stream.recent[-9:-1])
        self.piece = self.stops.push(self.decoder.push(self.token))
        if self.stops.found:
            self._finish("stop")

    def fail(self, error: UserError) -> None:
        """Finish because of an error."""
        self.error, self.finished, self.token = error, "error", None

    def _finish(self, reason: str) -> None:
        self.finished, self.token = reason, None
        if self.decoder is not None and not self.stops.found:
            self.piece += self.stops.push(self.decoder.flush()) + self.stops.flush()


def write(writer: Writer, prompt: Any) -> Generator[Any, None, None]:
    """Let a session read the prompt and write; yield what is new, in pieces."""
    session = writer.session
    with session._exclusive():
        read_prompt(session, prompt)
        stream = session._stream
        while not writer.finished:
            assert stream.logits is not None
            writer.choose(stream.logits)
            if writer.token is not None:
                for _ in session._reader.feed(stream, [writer.token], learn=writer.learn):
                    writer.was_read()
            if writer.piece:
                yield writer.piece
                writer.piece = ""
        if writer.error:
            raise writer.error


def replay(session: SessionState, ids: list[int], learn: bool | None = None) -> None:
    """Read tokens that this session wrote once, as if it wrote them now. Same state as after writing them.

    ``learn``: learn them (objective "loss"); None: as in the configuration.
    """
    with session._exclusive():
        read_prompt(session, None)
        reader = session._reader
        for n, _ in reader.feed(session._stream, ids, learn=reader.config.learn == "all" if learn is None else learn):
            session._stream.written += n


def read_exactly(session: SessionState, ids: list[int], learn: bool = True, prefix: bool = False) -> None:
    """Read ids as they are, after held characters; with ``prefix``, BOS comes first where a stream begins.

    ``learn``: False for tokens that are read but not learned (objective "loss").
    """
    with session._exclusive():
        session._flush()
        begin = session._begin() if prefix else []
        session._feed_all(ids if ids[: len(begin)] == begin else begin + ids, learn=learn)


def read_prompt(session: SessionState, prompt: Any) -> None:
    """Read what is held and the prompt, or BOS if there is nothing else; UserError where nothing can be continued."""
    check_continuable(session, prompt)
    for ids in () if prompt is None else session._ids(prompt):
        session._feed_all(ids)
    session._flush()
    if session._stream.logits is None:
        session._feed_all(session._begin())
    if session._stream.logits is None:
        raise UserError(NOTHING)


def check_continuable(session: SessionState, prompt: Any) -> None:
    """Raise UserError when there is nothing to continue, as far as can be told without reading."""
    empty = prompt is None or (isinstance(prompt, str | list | tuple) and not prompt)
    if session._stream.logits is None and empty and not session._held and not session._begin():
        raise UserError(NOTHING)


def end_tokens(root: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a text."""
    own = getattr(getattr(root, "generation_config", None), "eos_token_id", None)
    ids = [own if own is not None else root.config.get_text_config().eos_token_id]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    flat = [i for x in ids for i in (x if isinstance(x, list | tuple) else [x])]
    return {int(i) for i in flat if i is not None}
