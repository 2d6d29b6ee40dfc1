"""``inplace-ttt chat``."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UserError
from .sessions import Saver, deferred_interrupt, open_session, state_option, stats_lines

HELP = """\
/help            this
/stats           where the session stands
/ask QUESTION    answer from the fast weights alone, nothing in context; leaves no trace
/read FILE       read a text file
/score TEXT      loss of a text as the continuation, in nats per token; leaves no trace
/history         what was said since the start
/forget          forget everything: context and fast weights
/drop            forget the context, keep what was learned
/fork [FILE]     go on with a copy; with FILE, the copy is saved there from now on
/undo            take back the last turn
/save [FILE]     save now
/quit            save and leave (as does Ctrl-D). Ctrl-C stops the answer; what was written stays learned
Anything else is read, and continued."""


def chat(
    session: Annotated[
        Path | None, typer.Option(help="Session file: continued if it exists, made if not. Left out: nothing is kept.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id. Left out: the session's, or the shipped model.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.", min=0.0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less repetition.")] = 1.1,
    seed: Annotated[int | None, typer.Option(help="For the same answers again.")] = None,
    window: Annotated[int | None, typer.Option(help="New session: tokens that attention keeps.", min=1)] = None,
    state: Annotated[str | None, typer.Option(help="New session: dense, auto, or a rank.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Left out: the GPU if there is one.")] = None,
) -> None:
    """Talk to a session that remembers: it learns from what you and it write."""
    from rich.console import Console

    log = Console(stderr=True)
    with log.status("loading the model"):
        from ..session.sampling import Sampling

        choice = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed)
        opened = open_session(session, model, device, {"window": window, "state": state_option(state)})
    talk = Chat(opened, session, {**asdict(choice), "max_new_tokens": max_tokens})
    talk.greet()
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() arrow keys and history)
    while talk.running:
        talk.turn()


class Chat:
    """The conversation. Text goes to stdout as it is written, remarks to stderr."""

    def __init__(self, session: Any, path: Path | None, sampling: dict[str, Any]) -> None:
        self.session, self.path, self.sampling, self.running = session, path, sampling, True
        self.saver = Saver(session, path)
        self.messages: list[dict[str, str]] = []
        self.undo: list[tuple[Any, int]] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: self.say(HELP),
            "stats": lambda _: self.say("\n".join(stats_lines(self.session))),
            "ask": self.ask,
            "read": self.read,
            "score": self.score,
            "history": lambda _: self.say("\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "empty"),
            "forget": self.forget,
            "drop": self.drop,
            "fork": self.fork,
            "undo": self.take_back,
            "save": self.save,
            "quit": self.quit,
            "exit": self.quit,
        }

    @property
    def templated(self) -> bool:
        return bool(getattr(self.session.tokenizer, "chat_template", None))

    def say(self, text: str) -> None:
        typer.echo(text, err=True)

    def greet(self) -> None:
        tokens = self.session.stats().tokens
        self.say(f"{self.path or 'a new session'}: {tokens:,} tokens so far. /help lists the commands.")
        if not self.templated:
            self.say("This model has no chat template: it continues the text you type.")

    def turn(self) -> None:
        """One line of the user's."""
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return self.quit("")
        except KeyboardInterrupt:
            return self.say("\n(/quit or Ctrl-D to leave)")
        if not line.strip():
            return None
        try:
            name, _, rest = line[1:].partition(" ")
            if not line.startswith("/"):
                self.answer(line)
            elif name in self.commands:
                self.commands[name](rest.strip())
            else:
                self.say(f"there is no /{name}: /help lists the commands")
        except UserError as error:
            self.say(f"error: {error}")
        except OSError as error:
            self.say(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        self.saver.sometimes()
        return None

    # -- answers --------------------------------------------------------------------------------------------------

    def answer(self, text: str) -> None:
        before = self.session.snapshot()
        said = len(self.messages)
        self.messages.append({"role": "user", "content": text})
        reply = self.stream(self.session, self.prompt(text))
        self.messages.append({"role": "assistant", "content": reply})
        self.undo = [*self.undo[-9:], (before, said)]

    def prompt(self, text: str) -> Any:
        """What is fed for a turn: ids by the chat template's own words, or the text."""
        if not self.templated:
            return text if self.session.stats().tokens == 0 else "\n" + text
        tokenizer = self.session.tokenizer
        before = tokenizer.apply_chat_template(self.messages[:-1], tokenize=False) if len(self.messages) > 1 else ""
        whole = tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        new = whole[len(before) :] if whole.startswith(before) else whole
        return tokenizer(new, add_special_tokens=False)["input_ids"]

    def stream(self, session: Any, prompt: Any) -> str:
        """Prints an answer as it comes; Ctrl-C ends it."""
        pieces = []
        with deferred_interrupt() as interrupt:
            writing = session.generate(prompt, stream=True, **self.sampling)
            try:
                for piece in writing:
                    pieces.append(piece)
                    typer.echo(piece, nl=False)
                    sys.stdout.flush()
                    if interrupt.wanted:
                        break
            finally:
                writing.close()
        typer.echo("")
        return "".join(pieces)

    # -- commands -------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> None:
        if not question:
            raise UserError("/ask QUESTION")
        with self.session.fork() as copy:
            copy.drop_context()
            self.stream(copy, question)

    def read(self, name: str) -> None:
        if not name:
            raise UserError("/read FILE")
        from rich.console import Console

        from .read import check, read_one

        path = Path(name).expanduser()
        length = check(path)
        with deferred_interrupt() as interrupt:
            try:
                self.say(read_one(self.session, path, length, interrupt, self.saver, Console(stderr=True)))
            except KeyboardInterrupt:
                self.say("stopped; what was read so far stays")

    def score(self, text: str) -> None:
        found = self.session.score(text)
        self.say(f"{found.mean:.3f} nats per token over {len(found.losses)} tokens")

    def forget(self, _: str) -> None:
        self.session.reset()
        self.messages, self.undo = [], []
        self.say("forgotten")

    def drop(self, _: str) -> None:
        self.session.drop_context()
        self.messages = []
        self.say("context forgotten; what was learned stays")

    def fork(self, name: str) -> None:
        path = Path(name).expanduser() if name else None
        if path is not None and path.exists():
            raise UserError(f"{path} exists already")
        if self.path is not None:
            self.saver.now()
        copy = self.session.fork()
        self.session, self.path, self.saver = copy, path, Saver(copy, path)
        self.saver.now()
        self.say(f"now a copy; {f'saved in {path}' if path else 'not saved unless you /save FILE'}")

    def take_back(self, _: str) -> None:
        if not self.undo:
            raise UserError("nothing to take back")
        before, said = self.undo.pop()
        self.session.restore(before)
        self.messages = self.messages[:said]
        self.say("taken back")

    def save(self, name: str) -> None:
        path = Path(name).expanduser() if name else self.path
        if path is None:
            raise UserError("/save FILE: this session has no file yet")
        self.session.save(path)
        self.path = self.saver.path = path
        self.say(f"saved: {path}")

    def quit(self, _: str) -> None:
        self.running = False
        if self.path is not None:
            self.saver.now()
            self.say(f"saved: {self.path}")
