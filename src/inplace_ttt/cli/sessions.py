"""What ``read``, ``chat`` and ``inspect SESSION`` share: options and session files; and chat templates."""

import json
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import typer

from ..errors import UserError
from ..shipped import SHIPPED
from .usage import quiet_libraries

Messages = Sequence[dict[str, str]]

Model = Annotated[str | None, typer.Option(help="Path or hub id. Default: its own, or shipped.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: the GPU, if any.")]
Window = Annotated[int | None, typer.Option(help="New session: tokens attention keeps.", min=1)]
Sinks = Annotated[int | None, typer.Option(help="New session: first tokens kept, too.", min=0)]
Decay = Annotated[float | None, typer.Option(help="New session: share forgotten per update.")]
ChunkSize = Annotated[int | None, typer.Option(help="New session: tokens per update.", min=1)]
State = Annotated[str | None, typer.Option(help="New session: dense, auto or a rank.")]


# -- session files -----------------------------------------------------------------------------------------------------


def open_session(
    path: Path | None, model: str | None, device: str | None, options: dict[str, Any], write: bool = True
) -> Any:
    """The session in ``path``, or a new one where there is no such file (or no path).

    The file names its model; ``model`` overrides that (the weights must be the same). ``options`` are for a new
    session only. UserError on everything that does not fit, and, with ``write``, when the file could not be saved.
    """
    if path is not None and write:
        check_place(path)
    options = {name: value for name, value in options.items() if value is not None}
    if "state" in options:
        options["state"] = _state(options["state"])
    if path is None or not path.exists():
        session = _begin(model or SHIPPED, device, options)
        if path is not None and write:
            from ..session.writers import remember

            remember(session, path)
        return session
    if options:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise UserError(f"{path} exists, and {given} is for a new session: leave that out, or name a new file")
    return _go_on(path, model, device)


def _begin(name: str, device: str | None, options: dict[str, Any]) -> Any:
    from ..session import Session

    session = Session(*_load(name, device), **options)
    session.origin = _origin(name)
    return session


def _go_on(path: Path, model: str | None, device: str | None) -> Any:
    from ..session import Session
    from ..session.files import model_name

    known = model_name(path)
    name = model or known or SHIPPED
    try:
        loaded = _load(name, device)
    except UserError as error:
        if model or not known or known == SHIPPED:
            raise
        raise UserError(f"{path} was made with the model {known}: {error}. Say where it is with --model") from None
    try:
        session = Session.load(path, *loaded)
    except UserError as error:
        if "was written" not in str(error):
            raise
        raise UserError(f"{error} (the model is {name}; --model names another)") from None
    session.origin = _origin(name)
    return session


def _load(name: str, device: str | None) -> tuple[Any, Any]:
    from ..hf.load import load

    quiet_libraries()
    return load(name, device)


def _origin(name: str) -> str:
    """A name that still holds in another directory."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != SHIPPED and path.exists() else name


def check_place(path: Path) -> None:
    """Before the work, not after it. UserError when no session can be saved in ``path``."""
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a session file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: name a session file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {folder}")
    try:
        if path.exists():
            open(path, "ab").close()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _state(text: str) -> str | int:
    """``--state``: dense, auto or a rank."""
    if text in ("dense", "auto"):
        return text
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise UserError(f"--state {text}: dense, auto, or a rank (1 or more)")


# -- chat templates ----------------------------------------------------------------------------------------------------

WORDS, REPLY = f"words{token_hex(8)}", f"reply{token_hex(8)}"
"""Stand where the user's words and the model's go."""
SOME: Messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class Template:
    """A tokenizer's chat template turn by turn, in token ids: of each turn only what was not fed before.

    The template's special tokens are special tokens; what looks like one in the user's words is spelled out, character
    by character if need be. UserError when the template cannot be used so.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        fixed = self._ids(self._render([*SOME, {"role": "user", "content": WORDS}], True))
        self.control = {i for i, token in added.items() if token.special or i in fixed} - {tokenizer.unk_token_id}
        """Special tokens, and whatever else was added to the vocabulary and is used by the template."""
        self.ends = [i for i in self.closing(SOME) if i in self.control][:1]
        """The token that ends an answer, if it has one."""

    @classmethod
    def of(cls, session: Any) -> "Template | None":
        """The template of a session's tokenizer, if it has one. Answers end where it ends a turn from now on."""
        from ..session.session import end_tokens

        if not getattr(session.tokenizer, "chat_template", None):
            return None
        template, root = cls(session.tokenizer), session._reader.root
        root.generation_config.eos_token_id = sorted(end_tokens(root, session.tokenizer) | set(template.ends))
        return template

    def feed(self, session: Any, messages: Messages, words: str) -> list[int]:
        """Ids that let ``session`` answer the user's words after ``messages``."""
        if not messages and self.goes_on(session._stream.recent):
            messages = SOME
        ids = self.opening(messages, words)
        if messages:
            return ids
        if not session.stats().in_context and not session.stats().held_characters:
            session._stream.started = True  # the template itself says how a text begins
            return ids
        prefix = session._encoder.prefix
        return ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids

    def opening(self, messages: Messages, words: str) -> list[int]:
        """Ids of a user's turn after ``messages`` (their ``closing`` was fed), up to where the answer begins."""
        ids, plain = (self._ids(self._turn(messages, text)) for text in (words, WORDS))
        if self._controls(ids) != self._controls(plain):
            head, _, tail = self._turn(messages, WORDS).partition(WORDS)
            ids = [*self._ids(head), *self._spell(words), *self._ids(tail)]
        return ids[_common(ids, self.closing(messages)) :] if messages else ids

    def closing(self, messages: Messages) -> list[int]:
        """Ids that follow the last answer in ``messages`` whatever comes next: the end of the turn."""
        answered = [*messages[:-1], {"role": "assistant", "content": REPLY}]
        end = self._ids(self._after_reply(self._render(answered, False)))
        return end[: _common(end, self._ids(self._turn(messages, WORDS)))]

    def goes_on(self, recent: Sequence[int]) -> bool:
        """Whether a turn ends in the tokens ``recent``: the beginning of a conversation (a system prompt) was fed."""
        closing, n = self.closing(SOME), len(self.closing(SOME))
        return bool(self.ends) and any(list(recent[i : i + n]) == closing for i in range(len(recent) - n + 1))

    def _turn(self, messages: Messages, words: str) -> str:
        """A user's turn as text: all of the template at first, later what comes after the last answer."""
        user = {"role": "user", "content": words}
        if not messages:
            return self._render([user], True)
        return self._after_reply(self._render([*messages[:-1], {"role": "assistant", "content": REPLY}, user], True))

    def _render(self, messages: Messages, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt))
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"this model's chat template fails ({error}): --plain does without it") from None

    def _after_reply(self, text: str) -> str:
        _, found, rest = text.partition(REPLY)
        if not found:
            raise UserError("this model's chat template changes what was said: --plain does without it")
        return rest

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _controls(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.control]

    def _spell(self, words: str) -> list[int]:
        """Ids of words without the tokens that were added to the vocabulary."""
        from tokenizers import Tokenizer

        spec = json.loads(self.tokenizer.backend_tokenizer.to_str())
        spec |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        ids: list[int] = Tokenizer.from_str(json.dumps(spec)).encode(words, add_special_tokens=False).ids
        if self._controls(ids):
            raise UserError("that has a special token of this model in it, which it cannot read as text: rephrase it")
        return ids


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
