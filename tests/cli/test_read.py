"""read: the text reaches the session whole, however many files and pieces it comes in."""

import codecs
import re
import signal
from importlib import import_module

import pytest
import torch
from tiny_models import CHUNK, opened, tiny
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.shipped import DEFAULT_MODEL

module = import_module("inplace_ttt.cli.read")
TEXT = "the read_header of a file; na\u00efve caf\u00e9 \N{WHALE} and then\n\n  it is written.\n"


@pytest.fixture
def read(cli, folder, tmp_path):
    """Reads into a session, by default a new one: what was printed."""

    def run(*arguments, session=None, input=None) -> str:
        options = ("--session", session or tmp_path / "s.session", "--model", folder.model)
        result = cli("read", *arguments, *options, input=input)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        return result.stdout

    return run


@pytest.fixture
def same_as(folder, tmp_path):
    """Whether a session file holds the state after one reading of a text."""

    def check(text: str, path=None, **options) -> ittt.Session:
        session = opened(path or tmp_path / "s.session", folder.model)
        expected = ittt.Session(session._reader.model, session.tokenizer, **options)
        expected.read(text)
        assert session.stats().tokens == expected.stats().tokens > 0
        torch.testing.assert_close(session.next_logits, expected.next_logits)
        return session

    return check


def test_one_file(read, same_as, folder, words, tmp_path):
    printed = read(folder.text)
    session = same_as(words)
    total = session.stats().tokens
    scored = ittt.Session(session._reader.model, session.tokenizer).read(words, scored=True)
    first, second, *_, last = printed.splitlines()
    assert first.startswith(f"text.txt: {total:,} tokens in ")
    assert first.endswith(f"loss {scored.mean:.3f} nats per token")
    updates = (total - session.stats().pending) // CHUNK
    assert f"{total:,} tokens; {updates} updates a layer, {session.stats().pending} tokens wait" in second
    assert last == f"Session: {tmp_path / 's.session'}"


def test_pieces_cut_nothing(read, same_as, tmp_path, monkeypatch):
    """Characters, line ends and words that pieces of a few bytes cut through; a byte order mark at the beginning."""
    monkeypatch.setattr(module, "FIRST", 7)
    monkeypatch.setattr(module, "LARGEST", 7)
    text = TEXT * 8
    data = codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode()
    (tmp_path / "dos.txt").write_bytes(data)
    read(tmp_path / "dos.txt")
    same_as(text)
    read("-", session=tmp_path / "pipe", input=data)
    same_as(text, tmp_path / "pipe")


def test_several_files_and_runs_are_one_text(read, same_as, tmp_path):
    """As if joined by cat: several files, standard input among them, in one run or in two."""
    (tmp_path / "a").write_text(TEXT[:50])
    (tmp_path / "b").write_text(TEXT * 3)
    (tmp_path / "empty").write_text("")
    printed = read(tmp_path / "a", "-", tmp_path / "empty", tmp_path / "b", input=TEXT * 6)
    assert "\nstandard input: " in printed
    assert "\nempty: empty\n" in printed
    read(tmp_path / "b")
    same_as(TEXT[:50] + TEXT * 12)


def test_short_text_counts_what_is_held(read, same_as, tmp_path):
    """Few characters become no tokens yet: they are counted all the same, and kept."""
    printed = read("-", input="the file")
    session = same_as("the file")
    assert session.stats().held_characters == 8
    assert printed.startswith(f"standard input: {session.stats().tokens} tokens in ")
    assert "loss" not in printed


def test_settings_of_a_new_session(cli, folder, same_as, words, tmp_path):
    options = ("--decay", 0.2, "--chunk-size", 5, "--state", "auto", "--device", "cpu")
    result = cli("read", folder.text, "--session", tmp_path / "s.session", "--model", folder.model, *options)
    assert result.exit_code == 0, result.output
    session = same_as(words, decay=0.2, chunk_size=5, state="auto")
    assert session.stats().settings["decay"] == 0.2
    result = cli(
        *("read", folder.text, "--session", tmp_path / "w", "--model", folder.full),
        *("--window", 40, "--sinks", 3, "--state", 7),
    )
    assert "window 40, sinks 3, chunk_size 16" in result.stdout
    assert opened(tmp_path / "w", folder.full)._reader.form == 7


def test_the_model_is_remembered(cli, folder, tmp_path, monkeypatch):
    """By its full path: from another directory, and without --model."""
    monkeypatch.chdir(folder.model.parent)
    path = tmp_path / "s"
    assert cli("read", folder.text, "--session", path, "--model", "model").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = opened(path, folder.model).stats().tokens
    assert cli("read", folder.text, "--session", "../s").exit_code == 0
    assert opened(path, folder.model).stats().tokens > 1.9 * before


def test_shipped_model(cli, tmp_path):
    """The default, with names that a terminal's markup would swallow."""
    (tmp_path / "[b]draft.txt").write_text(TEXT * 20)
    result = cli("read", tmp_path / "[b]draft.txt", "--session", tmp_path / "[i]s")
    assert result.stdout.startswith("[b]draft.txt: ")
    assert result.stdout.endswith(f"Session: {tmp_path / '[i]s'}\n")
    shown = cli("inspect", tmp_path / "[i]s").stdout
    assert shown.startswith(f"{tmp_path / '[i]s'}: model shipped\n")
    assert opened(tmp_path / "[i]s", DEFAULT_MODEL).stats().updates > 0


def test_pieces_follow_the_speed(folder):
    """So many bytes that Ctrl-C is looked at about twice a second, on any machine."""
    source = module.TextToRead(folder.text)
    source.piece = 2048
    for seconds, expected in ((0.1, 4096), (0.5, 4096), (2, 2048), (2, 1024), (2, 512), (2, 512)):
        source.pace(seconds)
        assert source.piece == expected
    for _ in range(20):
        source.pace(0.1)
    assert source.piece == module.LARGEST


def test_saved_now_and_then(monkeypatch):
    """Not before five seconds, with at most a twentieth of the time, and only when there is something new."""
    clock, saved = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    class Slow:
        def save(self, path):
            saved.append(clock[0])
            clock[0] += 2

    saver = module.Saver(Slow(), "file")
    for _ in range(100):
        clock[0] += 1
        saver.sometimes()
    assert not saved
    for _ in range(100):
        clock[0] += 1
        saver.changed = True
        saver.sometimes()
    assert saved == [201, 244, 287]
    saver.rest()
    saver.rest()
    assert len(saved) == 4
    module.Saver(Slow(), None).now()
    assert len(saved) == 4


def test_saved_while_reading(cli, folder, tmp_path, monkeypatch):
    """What a crash at the end would leave."""
    monkeypatch.setattr(module.Saver, "rest", lambda _: None)
    path = tmp_path / "s"
    cli("read", folder.text, "--session", path, "--model", folder.model)
    assert not path.exists()
    monkeypatch.setattr(module.Saver, "LEAST", 0.0)
    monkeypatch.setattr(module.Saver, "SHARE", 1e9)
    cli("read", folder.text, "--session", path, "--model", folder.model)
    assert opened(path, folder.model).stats().tokens > 100


class TestStudy:
    @pytest.fixture
    def study(self, cli, folder, tmp_path):
        def run(*arguments, model="plain", input=None):
            objective = ("--objective", "loss") if model == "plain" else ()
            options = ("--session", tmp_path / "s.session", "--model", getattr(folder, model), *objective)
            return cli("read", *arguments, *options, "--chunk-size", 4, input=input)

        return run

    def test_files_are_studied_after_they_were_read(self, study, folder, tmp_path):
        (tmp_path / "a").write_text("the file is read. then it is written! where is the block?\n")
        result = study(tmp_path / "a", "--study", 0.02)
        assert result.exit_code == 0, result.output
        read, studied, stats = result.stdout.splitlines()[:3]
        assert read.startswith("a: ")
        assert re.match(r"a: studied 3 sentences and \d+ questions in .* s \(\d+ updates\), loss [\d.]+ to ", studied)
        model = ittt.attach(tiny(), ittt.InPlaceTTTConfig(objective="loss"))
        plain = ittt.Session(model, tokenizer := AutoTokenizer.from_pretrained(folder.plain), chunk_size=4)
        plain.read((tmp_path / "a").read_text())
        session = ittt.Session.load(tmp_path / "s.session", model, tokenizer)
        updates = int(re.search(r"\((\d+) updates\)", studied).group(1))
        assert session.stats().tokens == plain.stats().tokens
        assert session.stats().updates == -(-plain.stats().tokens // 4) + updates
        assert f"{session.stats().updates} updates a layer" in stats

    def test_ctrl_c_keeps_what_was_learned(self, study, tmp_path, monkeypatch):
        (tmp_path / "a").write_text("the file is read. then it is written! where is the block?\n" * 20)
        real = import_module("inplace_ttt.session.study").learn

        def learn(*arguments):
            signal.raise_signal(signal.SIGINT)
            return real(*arguments)

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr("inplace_ttt.session.study.learn", learn)
        try:
            result = study(tmp_path / "a", "--study", 0.05)
        finally:
            signal.signal(signal.SIGINT, before)
        assert result.exit_code == 130
        assert result.stderr == f"interrupted while studying a; that is kept in {tmp_path / 's.session'}\n"

    def test_refusals(self, study, folder, tmp_path):
        for arguments, model, why in (
            ((folder.text, "--study", 0), "plain", "--study 0: minutes, above 0"),
            (("-", "--study", 1), "plain", "standard input cannot: give files"),
            ((folder.text, "--study", 1), "full", "begin one with --objective loss"),
        ):
            result = study(*arguments, model=model, input="some text")
            assert (result.exit_code, result.stdout) == (2, "")
            assert why in result.stderr
