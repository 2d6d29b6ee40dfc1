"""Ctrl-C, kill -9, and a terminal: nothing that was learned is lost."""

import os
import re
import select
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import torch
from forked import Forked
from tiny_models import fed, opened

import inplace_ttt as ittt
from inplace_ttt.cli import main
from inplace_ttt.session.sampling import Sampler

module = import_module("inplace_ttt.cli.read")
TEXT = "the file is read and then it is written after the block.\n"


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def as_in_the_foreground():
    """Where the tests run in the background, Ctrl-C may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.session"


@pytest.fixture
def during(monkeypatch):
    """Presses Ctrl-C within calls of a method, by their numbers: before it does its work."""

    def set_up(where: str, *numbers: int) -> None:
        owner, name = where.rsplit(".", 1)
        owner = getattr(import_module(owner.rsplit(".", 1)[0]), owner.rsplit(".", 1)[1])
        real, calls = getattr(owner, name), []

        def call(*arguments, **options):
            calls.append(1)
            for number in numbers:
                if number == len(calls):
                    ctrl_c()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    return set_up


READ, SAVE = "inplace_ttt.session.session.Session.read", "inplace_ttt.session.session.Session.save"
SAMPLE = "inplace_ttt.session.sampling.Sampler.__call__"


class TestRead:
    @pytest.fixture
    def read(self, cli, folder, path, tmp_path, monkeypatch):
        """Reads a file of 20 lines, a line at a time, and another one."""
        for name in ("FIRST", "LARGEST"):
            monkeypatch.setattr(module, name, len(TEXT))
        for name in "ab":
            (tmp_path / name).write_text(TEXT * 20)
        return lambda: cli("read", tmp_path / "a", tmp_path / "b", "--session", path, "--model", folder.model)

    def check(self, folder, path, lines: int) -> None:
        session = opened(path, folder.model)
        expected = ittt.Session(session._reader.model, session.tokenizer)
        expected.read(TEXT * lines)
        assert session.stats().tokens == expected.stats().tokens
        torch.testing.assert_close(session.next_logits, expected.next_logits)

    @pytest.mark.parametrize(("call", "lines", "name"), [(1, 1, "a"), (7, 7, "a"), (20, 20, "a"), (23, 23, "b")])
    def test_once(self, read, during, folder, path, call, lines, name):
        """The piece is read to its end, nothing after it, and the session goes on right there."""
        during(READ, call)
        result = read()
        assert result.exit_code == 130
        done = (lines - 1) % 20 + 1
        assert result.stderr == f"interrupted after {done * len(TEXT):,} bytes of {name}; that is kept in {path}\n"
        first = "a: " if lines > 20 else f"{opened(path, folder.model).stats().tokens} tokens; "
        assert result.stdout.startswith(first)
        self.check(folder, path, lines)

    def test_twice_breaks_off(self, read, during, folder, path):
        """The second one is for the impatient: what was read before is kept."""
        during(READ, 7, 7)
        result = read()
        assert result.exit_code == 130
        assert "that is kept in" in result.stderr
        self.check(folder, path, 6)

    def test_while_saving(self, read, during, folder, path):
        """However often: it would cost what was learned."""
        during(READ, 7)
        during(SAVE, 1, 1, 1)
        assert read().exit_code == 130
        self.check(folder, path, 7)

    def test_while_the_model_loads(self, read, path, monkeypatch):
        monkeypatch.setattr("inplace_ttt.hf.load.load", lambda *_, **__: ctrl_c())
        result = read()
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
        assert not path.exists()

    def test_while_waiting_for_input(self, cli, folder, path, monkeypatch):
        """At once: nobody would like to type another line first."""

        class Slow:
            def __init__(self, *lines):
                self.lines = list(lines)

            def read1(self, size):
                return self.lines.pop(0) if self.lines else ctrl_c()

        monkeypatch.setattr(module.TextToRead, "_open", lambda _: module.nullcontext(Slow(TEXT.encode() * 9)))
        result = cli("read", "-", "--session", path, "--model", folder.model)
        assert result.exit_code == 130
        assert result.stderr.startswith(f"interrupted after {9 * len(TEXT)} bytes of standard input; ")
        self.check(folder, path, 9)
        monkeypatch.setattr(module.TextToRead, "_open", lambda _: module.nullcontext(Slow()))
        result = cli("read", "-", "--session", path, "--model", folder.model)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")
        self.check(folder, path, 9)

    def test_ignored(self, read, during, folder, path):
        """Of a command in the background, as nohup has it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        during(READ, 3, 3, 3)
        assert read().exit_code == 0
        self.check(folder, path, 40)

    def test_afterwards_ctrl_c_is_as_before(self, read, during):
        before = signal.getsignal(signal.SIGINT)
        during(READ, 3)
        read()
        assert signal.getsignal(signal.SIGINT) is before


class TestChat:
    @pytest.fixture
    def chat(self, cli, path):
        def run(model: Path, lines: str, flags=("--max-tokens", 9, "--seed", 1)):
            return cli("chat", "--session", path, "--model", model, *flags, input=lines)

        return run

    def test_ends_the_answer(self, chat, folder, path, during, tokenizer):
        """What was written until then is kept. A script stops there: nobody is at the keyboard."""
        during(SAMPLE, 4)
        result = chat(folder.model, "the file\nnever read\n")
        assert result.exit_code == 130
        assert result.stderr.endswith(f"saved: {path}\ninterrupted\n")
        text = tokenizer.decode(fed(path, folder.model))
        assert text == "the file" + result.stdout.removesuffix("\n")
        assert 1 <= opened(path, folder.model).stats().written <= 8

    @pytest.mark.parametrize(("presses", "answer"), [((4,), "aaaa"), ((4, 4), "aaa")])
    def test_ends_the_turn_as_the_template_has_it(self, chat, chatty, path, during, says, presses, answer):
        """After the present token, or at once; in any case the end of the turn is fed."""
        from transformers import AutoTokenizer

        t = AutoTokenizer.from_pretrained(chatty)
        says([t.convert_tokens_to_ids("a")] * 9)
        during(SAMPLE, *presses)
        assert chat(chatty, "hi\n").exit_code == 130
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        assert fed(path, chatty) == t.apply_chat_template(messages, return_dict=False)

    def test_while_the_turn_ends(self, chat, chatty, path, during, says):
        """Too late: it is kept whole."""
        from transformers import AutoTokenizer

        t = AutoTokenizer.from_pretrained(chatty)
        says([t.convert_tokens_to_ids(x) for x in ("a", "<|im_end|>")])
        during(READ, 1, 1, 1)
        chat(chatty, "hi\n")
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]
        assert fed(path, chatty) == t.apply_chat_template(messages, return_dict=False)

    def test_twice_before_the_answer(self, chat, folder, path, during):
        """The turn is taken back whole."""
        chat(folder.model, "before\n")
        before = fed(path, folder.model)
        during(SAMPLE, 1, 1)
        result = chat(folder.model, "the file\n")
        assert result.exit_code == 130
        assert "stopped; nothing has changed\n" in result.stderr
        assert result.stdout == ""
        assert fed(path, folder.model) == before

    def test_reading_a_file(self, chat, folder, path, tmp_path, during, monkeypatch):
        monkeypatch.setattr(module, "FIRST", len(TEXT))
        monkeypatch.setattr(module, "LARGEST", len(TEXT))
        (tmp_path / "text").write_text(TEXT * 20)
        during(READ, 5)
        result = chat(folder.model, f"/read {tmp_path / 'text'}\n")
        assert "stopped; what was read stays learned\n" in result.stderr
        TestRead().check(folder, path, 5)


def run_command(arguments: list[str]) -> None:
    sys.argv = ["inplace-ttt", *arguments]
    main()


def test_killed_while_reading(folder, path, tmp_path):
    """kill -9 while it reads and saves all the time: the file is whole, and the next saving leaves nothing behind."""
    (tmp_path / "text").write_text(TEXT * 20_000)
    command = ["read", str(tmp_path / "text"), "--session", str(path), "--model", str(folder.model)]

    def read_and_save_all_the_time() -> None:
        module.Saver.LEAST, module.Saver.SHARE = 0.0, 1e9
        run_command(command)

    process = Forked(read_and_save_all_the_time)
    try:
        wait_for(path.exists)
        first = path.stat().st_ino
        wait_for(lambda: path.stat().st_ino != first)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    (tmp_path / f".{path.name}.part").mkdir(exist_ok=True)
    (tmp_path / f".{path.name}.part" / path.name).write_bytes(b"half a session")
    session = opened(path, folder.model)
    assert session.stats().tokens > 100
    session.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "text"]


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Terminal:
    """A command in a terminal of its own; what the model writes is an endless word."""

    def __init__(self, *arguments: object) -> None:
        import fcntl
        import pty
        import termios

        self.master, slave = pty.openpty()

        def work() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            os.environ |= {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1", "INPUTRC": os.devnull}
            Sampler.__call__ = lambda *_: time.sleep(0.01) or 70  # type: ignore[method-assign]
            run_command([str(argument) for argument in arguments])

        self.process = Forked(work, slave)
        os.close(slave)
        self.seen = ""

    def pump(self, seconds: float) -> bool:
        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                data = b""
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
            return bool(data)
        return True

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str] | None:
        """The first match in what is shown from now on."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert self.pump(0.1), self.seen[-2000:]
            if time.monotonic() > end:
                return None
        self.seen = self.seen[found.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> tuple[int, str]:
        """Exit code, and what came last."""
        while self.pump(0.1) and self.process.poll() is None:
            pass
        with suppress(OSError):
            while select.select([self.master], [], [], 0)[0] and self.pump(0):
                pass
        os.close(self.master)
        return self.process.wait(), self.seen


@pytest.fixture
def terminal():
    pytest.importorskip("pty")
    pytest.importorskip("termios")
    made = []

    def make(*arguments: object) -> Terminal:
        made.append(Terminal(*arguments))
        return made[-1]

    yield make
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


class TestTerminal:
    def test_read(self, terminal, folder, path, tmp_path):
        """A progress bar, Ctrl-C, and what remains on the screen."""
        (tmp_path / "text").write_text(TEXT * 40_000)
        t = terminal("read", tmp_path / "text", "--session", path, "--model", folder.model)
        assert t.wait_for("loading the model")
        assert t.wait_for(r"text .* [1-9][0-9,]* tokens, [0-9,]+/s, loss [0-9.]+ ")
        t.type("\x03")
        assert t.wait_for("interrupted after ")
        code, rest = t.end()
        assert code == 130
        bytes_read = int(rest.split(" bytes")[0].replace(",", ""))
        session = opened(path, folder.model)
        expected = ittt.Session(session._reader.model, session.tokenizer)
        expected.read((TEXT * 40_000)[:bytes_read])
        assert session.stats().tokens == expected.stats().tokens > 100

    def test_chat(self, terminal, chatty, path):
        """Prompts, history by the arrow keys, Ctrl-C in an answer and at the prompt, Ctrl-D."""
        pytest.importorskip("readline")
        t = terminal("chat", "--session", path, "--model", chatty, "--max-tokens", 1_000_000)
        assert t.wait_for("A new session, kept in")
        assert t.wait_for("> ")
        t.type("the file\n")
        assert t.wait_for(r"the file\n(\S+)\1{20}")
        t.type("\x03")
        assert t.wait_for("\n> ")
        for _ in range(2):
            for _ in range(20):  # Python's input() misses a signal that comes just before it waits, until the next key
                t.type("\x03")
                if t.wait_for("\n/quit or Ctrl-D to leave\n> ", seconds=2):
                    break
        t.type("/stats\n")
        figures = r"\n([0-9,]+) tokens, ([0-9,]+) of them written by the model"
        stats = t.wait_for(figures)
        assert t.wait_for("\n> ")
        t.type("\x1b[A\n")
        assert t.wait_for(figures)
        assert t.wait_for("\n> ")
        t.type("\x04")
        code, rest = t.end()
        assert code == 0
        assert rest == f"\nsaved: {path}\n"
        kept = opened(path, chatty).stats()
        assert stats.groups() == (f"{kept.tokens:,}", f"{kept.written:,}")
