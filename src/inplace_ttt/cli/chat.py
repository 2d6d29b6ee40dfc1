"""``inplace-ttt chat``."""

import re
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import UserError, in_one_line
from .read import Saver, TextToRead, deferred_interrupt, next_line, read_one
from .sessions import (
    Model,
    Objective,
    State,
    Window,
    check_place,
    check_session,
    nothing_learned,
    open_session,
    stats_lines,
)
from .usage import Device, tell

HELP = """\
/help          this
/stats         where the session stands
/ask QUESTION  answer from the fast weights alone; leaves no trace
/read FILE     read a text file and learn from it
/score TEXT    loss of a text as the continuation, in nats; leaves no trace
/history       what was said in this chat
/drop          forget the context, keep what was learned
/forget        forget everything: context and fast weights
/undo          take back the last turn, /read, /drop or /forget
/fork [FILE]   continue with a copy, kept in FILE; the session's file stays
/save [FILE]   save now; with FILE: there, from now on
/quit          save and leave, as does Ctrl-D
Ctrl-C ends an answer; what was written stays learned.
Anything else is read and answered."""
UNDO, UNDO_BYTES = 10, 1 << 28
"""Steps that can be taken back, at most; memory for them (one step in any case)."""
WANTED = {"ask": "QUESTION", "read": "FILE", "score": "TEXT"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat(
    session: Annotated[Path | None, typer.Option(help="Session file: continued, or made if new.")] = None,
    model: Model = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: less.")] = 1.1,
    seed: Annotated[int | None, typer.Option(help="For the same answers again.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without the model's chat template.")] = False,
    window: Window = None,
    state: State = None,
    device: Device = None,
    objective: Objective = None,
) -> None:
    """Talk to a session that learns from what is written."""
    log, options = Console(stderr=True), {"window": window, "state": state}
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p:g}: above 0, at most 1")
    if repetition_penalty <= 0:
        raise UserError(f"--repetition-penalty {repetition_penalty:g}: above 0")
    options = check_session(session, model, options)
    with ExitStack() as held:
        with log.status("loading the model"):
            from ..session.sampling import Sampling
            from ..session.template import Template
            from ..session.writers import holding

            choice = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed)
            held.enter_context(holding(session))
            opened = open_session(session, model, device, options, objective=objective)
            template = None if plain else Template.of(opened)
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401 (gives input() arrow keys and history)
        Conversation(opened, session, template, {**asdict(choice), "max_new_tokens": max_tokens}, log, held).run()


class Conversation:
    """The conversation. What the model writes goes to stdout as it comes, all else to stderr."""

    def __init__(
        self, session: Any, path: Path | None, template: Any, sampling: Any, log: Any, held: ExitStack
    ) -> None:
        self.session, self.template, self.sampling, self.log = session, template, sampling, log
        self.held = held
        """Keeps other processes from writing the session's file."""
        self.saver = Saver(session, path)
        self.messages: list[dict[str, str]] = []
        self.undo: list[tuple[Any, list[dict[str, str]]]] = []

    def say(self, text: str) -> None:
        tell(text, err=True)

    def run(self) -> None:
        """Until it is over; whatever ends it, the session is saved."""
        stats = self.session.stats()
        tokens, every = stats.tokens, f"every {stats.settings['chunk_size']:,} tokens"
        where = f"in {self.saver.path}" if self.saver.path else "nowhere unless you /save FILE"
        how = "answered" if self.template else "continued (no chat template)"
        self.say(f"{f'{tokens:,} tokens so far' if tokens else 'A new session'}, kept {where}.")
        self.say(f"What you type is {how}; /help lists the commands.")
        turn = " and at the end of each turn" if self.session.learns_by_loss else ""
        self.say(stats.warning or f"It learns after {every}{turn}; {stats.updates:,} updates so far.")
        with suppress(AttributeError):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        with deferred_interrupt() as self.interrupt:
            try:
                while (line := next_line(self.interrupt)) is not None:
                    self.turn(line)
            finally:
                self.interrupt.deaf = True
                self.keep()

    def turn(self, line: str) -> None:
        """One line of the user's."""
        try:
            if line.strip():
                self.do(line)
            self.saver.sometimes()
        except UserError as error:
            self.say(f"error: {in_one_line(error, None)}")
        except KeyboardInterrupt:
            self.say("\nstopped; nothing has changed")

    def do(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if not line.startswith("/"):
            self.answer(line)
        elif (command := getattr(self, f"on_{name}", None)) is None:
            raise UserError(f"there is no /{name}: /help lists the commands")
        elif name in WANTED and not rest.strip():
            raise UserError(f"say what: /{name} {WANTED[name]}")
        else:
            command(rest.strip())

    def answer(self, words: str) -> None:
        """A turn, whole or not at all."""
        self.mark()
        try:
            reply = self.stream(self.session, self.prompt(self.session, words, self.messages))
            self.interrupt.deaf = True
            said = {"role": "user", "content": words}, {"role": "assistant", "content": reply}
            self.messages = [*self.messages, *said]
            if self.template is not None:
                self.session.read(self.template.closing(self.messages))
            if self.session.learns_by_loss:
                self.session.commit()
        except BaseException:
            self.restore()
            raise

    def prompt(self, session: Any, words: str, messages: list[dict[str, str]]) -> Any:
        """Return the text or token ids that a turn feeds."""
        if self.template is not None:
            return self.template.feed(session, messages, words)
        stats = session.stats()
        return "\n" + words if stats.in_context or stats.held_characters else words

    def stream(self, session: Any, prompt: Any) -> str:
        """Prints an answer as it comes; Ctrl-C ends it. KeyboardInterrupt when nothing of it has come."""
        pieces: list[str] = []
        writing = session.generate(prompt, stream=True, **self.sampling)
        try:
            for piece in writing:
                pieces.append(piece)
                typer.echo(CONTROL.sub("\ufffd", piece) if sys.stdout.isatty() else piece, nl=False)
                sys.stdout.flush()
                if self.interrupt.wanted:
                    break
        except KeyboardInterrupt:
            if not pieces:
                raise
        finally:
            writing.close()
        typer.echo("")
        return "".join(pieces)

    def on_ask(self, question: str) -> None:
        with self.session.fork() as copy:
            copy.drop_context()
            if why := nothing_learned(copy):
                self.say(why)
            self.stream(copy, self.prompt(copy, question, []))

    def on_read(self, name: str) -> None:
        source = TextToRead(Path(name).expanduser().absolute())
        self.mark()
        try:
            self.say(read_one(self.session, source, self.interrupt, self.saver, self.log))
        except KeyboardInterrupt:
            self.say("stopped; what was read stays learned")

    def on_score(self, text: str) -> None:
        found = self.session.score(text)
        if not found.losses:
            raise UserError("that is too short: its first token has nothing before it")
        self.say(f"{found.mean:.3f} nats per token over {len(found.losses)} tokens")

    def on_help(self, _: str) -> None:
        self.say(HELP)

    def on_stats(self, _: str) -> None:
        self.say("\n".join(stats_lines(self.session)))

    def on_history(self, _: str) -> None:
        self.say("\n".join(f"{m['role']}: {m['content']}" for m in self.messages) or "nothing yet")

    def on_drop(self, _: str) -> None:
        self.clear(self.session.drop_context)
        self.say(f"the context is forgotten, {nothing_learned(self.session) or 'what was learned is kept'}")

    def on_forget(self, _: str) -> None:
        self.clear(self.session.reset)
        self.say("everything is forgotten")

    def clear(self, how: Any) -> None:
        self.mark()
        how()
        self.messages = []

    def mark(self) -> None:
        """To come back to with /undo."""
        stats = self.session.stats()
        most = UNDO_BYTES // max(stats.bytes_context + stats.bytes_fast_weights, 1)
        self.undo = [*self.undo, (self.session.snapshot(), self.messages)][-max(1, min(UNDO, most)) :]
        self.saver.changed = True

    def restore(self) -> None:
        before, self.messages = self.undo.pop()
        self.session.restore(before)

    def on_undo(self, _: str) -> None:
        if not self.undo:
            raise UserError("nothing to take back")
        self.restore()
        self.saver.changed = True
        self.say(f"taken back; {self.session.stats().tokens:,} tokens")

    def on_fork(self, name: str) -> None:
        path = self.new_file(name) if name else None
        self.keep()
        self.move(path)
        self.say(f"now a copy, kept {f'in {path}' if path else 'nowhere unless you /save FILE'}")

    def on_save(self, name: str) -> None:
        path = self.new_file(name) if name else self.saver.path
        if path is None:
            raise UserError("this session has no file yet: /save FILE")
        self.move(path)
        self.say(f"saved: {path}")

    def new_file(self, name: str) -> Path:
        path = Path(name).expanduser()
        check_place(path)
        if path.exists() and path != self.saver.path:
            raise UserError(f"{path} exists already: name a new file")
        return path

    def move(self, path: Path | None) -> None:
        from ..session.writers import holding

        saver = Saver(self.session, path)
        if path == self.saver.path:
            saver.now()
        else:
            with ExitStack() as held:
                held.enter_context(holding(path))
                saver.now()
                self.held.close()
                self.held.enter_context(held.pop_all())
        self.saver = saver

    def keep(self) -> None:
        """Saves what is not saved yet."""
        path = self.saver.path
        if self.saver.changed or (path is not None and not path.exists()):
            self.saver.now()
            self.say(f"saved: {path}" if path else "no file: this session is not kept")

    def on_quit(self, _: str) -> None:
        self.keep()
        raise typer.Exit
