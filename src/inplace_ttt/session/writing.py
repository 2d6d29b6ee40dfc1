"""Generation: sample a token, feed it, yield it."""

from collections.abc import Generator
from contextlib import closing
from typing import Any

from ..errors import UserError
from .parts import SessionParts as Session
from .sampling import Sampler, StopText
from .text import StreamDecoder

NOTHING = "nothing to continue: read something first, or give a prompt"


def write(session: Session, prompt: Any, most: int, stops: StopText, sampler: Sampler) -> Generator[str, None, None]:
    """Generate text; yield it in pieces."""
    decoder: StreamDecoder | None = None
    with closing(tokens(session, prompt, most, sampler)) as found:
        for token in found:
            decoder = decoder or StreamDecoder(session.tokenizer, session._stream.recent[-9:-1])
            if text := stops.push(decoder.push(token)):
                yield text
            if stops.found:
                return
    if text := stops.push("" if decoder is None else decoder.flush()) + stops.flush():
        yield text


def tokens(session: Session, prompt: Any, most: int, sampler: Sampler) -> Generator[int, None, None]:
    """Sample tokens, feed each and yield it."""
    with session._exclusive():
        read_prompt(session, prompt)
        reader, stream = session._reader, session._stream
        ends = end_tokens(reader.root, session.tokenizer)
        for _ in range(most):
            assert stream.logits is not None
            token = sampler(stream.recent, stream.logits)
            if token in ends:
                return
            for _piece in reader.feed(stream, [token], learn=reader.config.learn == "all"):
                stream.written += 1
            yield token


def replay(session: Session, ids: list[int], learn: bool | None = None) -> None:
    """Read tokens that this session wrote once, as if it wrote them now. Same state as after writing them.

    ``learn``: learn them (objective "loss"); None: as in the configuration.
    """
    with session._exclusive():
        read_prompt(session, None)
        reader = session._reader
        for n, _ in reader.feed(session._stream, ids, learn=reader.config.learn == "all" if learn is None else learn):
            session._stream.written += n


def read_exactly(session: Session, ids: list[int], learn: bool = True, prefix: bool = False) -> None:
    """Read ids as they are, after held characters; with ``prefix``, BOS comes first where a stream begins.

    ``learn``: False for tokens that are read but not learned (objective "loss").
    """
    with session._exclusive():
        session._flush()
        begin = session._begin() if prefix else []
        for _ in session._feed(ids if ids[: len(begin)] == begin else begin + ids, False, learn):
            pass


def read_prompt(session: Session, prompt: Any) -> None:
    """Read what is held and the prompt, or BOS if there is nothing else; UserError where nothing can be continued."""
    check_continuable(session, prompt)
    for ids in () if prompt is None else session._ids(prompt):
        for _ in session._feed(ids, False):
            pass
    session._flush()
    if session._stream.logits is None:
        for _ in session._feed(session._begin(), False):
            pass
    if session._stream.logits is None:
        raise UserError(NOTHING)


def check_continuable(session: Session, prompt: Any) -> None:
    """Raise UserError when there is nothing to continue, as far as can be told without reading."""
    held = session._encoder is not None and session._encoder.held
    empty = prompt is None or (isinstance(prompt, str | list | tuple) and not prompt)
    if session._stream.logits is None and empty and not held and not session._begin():
        raise UserError(NOTHING)


def check_most(most: int) -> None:
    """Raise UserError for a negative number of new tokens."""
    if most < 0:
        raise UserError(f"max_new_tokens {most}: 0 or more")


def end_tokens(root: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end a text."""
    own = getattr(getattr(root, "generation_config", None), "eos_token_id", None)
    ids = [own if own is not None else root.config.get_text_config().eos_token_id]
    ids.append(getattr(tokenizer, "eos_token_id", None))
    flat = [i for x in ids for i in (x if isinstance(x, list | tuple) else [x])]
    return {int(i) for i in flat if i is not None}
