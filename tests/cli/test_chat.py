"""chat without a chat template: what is fed, what each command does, and that everything is kept."""

from importlib import import_module

import pytest
import torch
from tiny_models import CHUNK, fed, opened

import inplace_ttt as ittt


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.session"


@pytest.fixture
def chat(cli, folder, path):
    """Types lines: the result. Answers have three tokens."""

    def run(*lines: str, flags=("--max-tokens", 3), keep=True, **options):
        text = "".join(f"{line}\n" for line in lines)
        where = ("--session", path) if keep else ()
        result = cli("chat", *where, "--model", folder.model, *flags, input=text, **options)
        assert result.exit_code == 0, result.output
        return result

    return run


@pytest.fixture
def word(tokenizer, says):
    """Every answer is this word."""
    ids = tokenizer(" and", add_special_tokens=False)["input_ids"]
    says(*[[*ids, tokenizer.eos_token_id]] * 40)
    return "and"


@pytest.fixture
def text(folder, path, tokenizer):
    """The session's text."""
    return lambda: tokenizer.decode(fed(path, folder.model))


def remarks(result) -> list[str]:
    """What a command said: without the greeting and the last line."""
    _, greeting, learns, *between, last = result.stderr.splitlines()
    assert greeting == "What you type is continued (no chat template); /help lists the commands."
    assert learns.startswith(f"It learns after every {CHUNK} tokens; ")
    assert last.startswith(("saved: ", "no file"))
    return between


def test_turns_are_one_text(chat, word, text, path):
    result = chat("the file", "", "  ", "is read\t", flags=())
    assert result.stdout == " and\n and\n"
    assert remarks(result) == []
    assert result.stderr.startswith(f"A new session, kept in {path}.\n")
    assert result.stderr.endswith(f"saved: {path}\n")
    assert text() == "the file and\nis read\t and"
    result = chat("then", flags=())
    assert " tokens so far, kept in " in result.stderr
    assert text() == "the file and\nis read\t and\nthen and"


def test_answers_are_the_sessions(chat, folder, tokenizer, path):
    """The model's own words, by the options; and the state that the session then has."""
    options = {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "seed": 5}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = chat("the file is", flags=[*flags, "--max-tokens", 20])
    expected = ittt.Session(ittt.from_pretrained(folder.model, dtype=torch.float32).eval(), tokenizer)
    assert result.stdout == expected.generate("the file is", max_new_tokens=20, **options) + "\n"
    session = opened(path, folder.model)
    torch.testing.assert_close(session.next_logits, expected.next_logits)
    assert session.stats().written == 20
    greedy = chat("the file is", flags=["--temperature", 0, "--max-tokens", 9], keep=False).stdout
    assert greedy == chat("the file is", flags=["--temperature", 0, "--max-tokens", 9, "--seed", 8], keep=False).stdout


def test_help_and_history(chat, word):
    result = chat("/help", "/history", "the file", "is", "/history", flags=())
    said = remarks(result)
    for name in ("help", "stats", "ask", "read", "score", "history", "drop", "forget", "undo", "fork", "save", "quit"):
        assert any(line.startswith(f"/{name} ") for line in said)
    assert said[-5:] == ["nothing yet", "user: the file", "assistant:  and", "user: is", "assistant:  and"]


def test_stats(chat, word, path, folder):
    said = remarks(chat("the file", "/stats", flags=()))
    stats = opened(path, folder.model).stats()
    assert said[0].startswith(f"{stats.tokens} tokens, {stats.written} of them written by the model; ")
    assert stats.written > 0


def test_read_and_score(chat, word, text, folder, words, tokenizer, path):
    result = chat(f"/read {folder.text}", "/score the file is", flags=())
    read, score = remarks(result)
    assert read.startswith("text.txt: ")
    assert result.stdout == ""
    session = opened(path, folder.model)
    expected = ittt.Session(session._reader.model, tokenizer)
    expected.read(words)
    torch.testing.assert_close(session.next_logits, expected.next_logits)
    found = expected.score("the file is")
    assert score == f"{found.mean:.3f} nats per token over {len(found.losses)} tokens"


def test_ask_leaves_no_trace(chat, word, text):
    result = chat("the file", "/ask who?", flags=())
    assert result.stdout == " and\n and\n"
    assert text() == "the file and"


def test_ask_sees_the_fast_weights_only(chat, folder, words, tokenizer):
    flags = ("--max-tokens", 12, "--temperature", 0, "--repetition-penalty", 1)
    result = chat(f"/read {folder.text}", "/ask the file", flags=flags)
    expected = ittt.Session(ittt.from_pretrained(folder.model, dtype=torch.float32).eval(), tokenizer)
    expected.read(words)
    assert result.stdout == expected.ask("the file", max_new_tokens=12) + "\n"
    expected.reset()
    assert result.stdout != expected.generate("the file", max_new_tokens=12) + "\n"


def test_drop_keeps_what_was_learned(chat, word, text, folder, path):
    chat(f"/read {folder.text}", "/drop", "the file", "/history", flags=())
    assert text() == "the file and"
    stats = opened(path, folder.model).stats()
    assert stats.updates > 10
    assert stats.tokens > 200


def test_forget(chat, word, text, folder, path):
    said = remarks(chat(f"/read {folder.text}", "the", "/forget", "file", "/history", flags=()))
    assert said[1:] == ["everything is forgotten", "user: file", "assistant:  and"]
    assert text() == "file and"
    assert opened(path, folder.model).stats().updates == 0


def test_undo(chat, word, text, folder, path, tokenizer, tmp_path):
    """Turns, /read, /drop and /forget, one after the other; of a fork, too."""
    lines = ["the file", "is read", f"/read {folder.text}", "/drop", "/forget", "then"]
    result = chat(*lines, "/undo", "/undo", "/undo", "/undo", "/history", flags=())
    assert remarks(result)[-4:] == ["user: the file", "assistant:  and", "user: is read", "assistant:  and"]
    assert remarks(result)[-5] == f"taken back; {len(fed(path, folder.model))} tokens"
    assert text() == "the file and\nis read and"
    result = chat("/forget", *lines, f"/fork {tmp_path / 'copy'}", *["/undo"] * 5, flags=())
    assert tokenizer.decode(fed(tmp_path / "copy", folder.model)) == "the file and"
    assert text() == "then and"


def test_undo_keeps_few_states_of_a_large_session(chat, word, monkeypatch):
    monkeypatch.setattr(import_module("inplace_ttt.cli.chat"), "UNDO_BYTES", 1)
    said = remarks(chat("the", "file", "/undo", "/undo", flags=()))
    assert said[0].startswith("taken back; ")
    assert said[1] == "error: nothing to take back"


def test_fork(chat, word, text, folder, path, tokenizer, tmp_path):
    """The session's file stays; the copy has its own, or none."""
    copy = tmp_path / "copy"
    said = remarks(chat("the", f"/fork {copy}", "file", flags=()))
    assert said == [f"saved: {path}", f"now a copy, kept in {copy}"]
    assert text() == "the and"
    assert tokenizer.decode(fed(copy, folder.model)) == "the and\nfile and"
    result = chat("file", "/fork", "is", flags=())
    assert "now a copy, kept nowhere unless you /save FILE" in remarks(result)
    assert result.stderr.endswith("no file: this session is not kept\n")
    assert text() == "the and\nfile and"


def test_save(chat, word, folder, path, tokenizer, tmp_path):
    """Somewhere else, from now on there."""
    new = tmp_path / "new"
    said = remarks(chat("the", "/save", f"/save {new}", "file", flags=()))
    assert said == [f"saved: {path}", f"saved: {new}"]
    assert tokenizer.decode(fed(path, folder.model)) == "the and"
    assert tokenizer.decode(fed(new, folder.model)) == "the and\nfile and"


def test_without_a_file(chat, word, tmp_path):
    result = chat("the", "/save", keep=False, flags=())
    assert result.stderr.startswith("A new session, kept nowhere unless you /save FILE.\n")
    assert remarks(result) == ["error: this session has no file yet: /save FILE"]
    assert result.stderr.endswith("no file: this session is not kept\n")
    result = chat("the", f"/save {tmp_path / 'new'}", keep=False, flags=())
    assert result.stderr.endswith(f"saved: {tmp_path / 'new'}\n")
    assert "no file" not in chat("/stats", keep=False).stderr


def test_quit(chat, word, text, path):
    """Saves, and reads no further; a session that has not changed is not written again."""
    result = chat("the", "/quit", "file", flags=())
    assert result.stderr.endswith(f"saved: {path}\n")
    assert text() == "the and"
    before = path.stat().st_mtime_ns
    assert "saved" not in chat("/stats", "/ask the", "/quit", flags=()).stderr
    assert path.stat().st_mtime_ns == before


def test_mistakes_end_nothing(chat, word, text, folder, path, tmp_path):
    latin, mine, none = (tmp_path / name for name in ("latin.txt", "mine.txt", "none"))
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    mine.write_text("dear to me")
    wrong = {
        "/nonsense": "there is no /nonsense: /help lists the commands",
        "/": "there is no /: /help lists the commands",
        "/ask": "say what: /ask QUESTION",
        "/read": "say what: /read FILE",
        "/score  ": "say what: /score TEXT",
        "/undo": "nothing to take back",
        f"/read {none}": f"{none}: no such file",
        "/read -": f"{tmp_path / '-'}: no such file",
        f"/read {tmp_path}": f"{tmp_path} is a directory: give text files",
        f"/read {latin}": f"{latin} is not UTF-8 text (byte 3 is 0xe9): convert it first",
        f"/save {mine}": f"{mine} exists already: name a new file",
        f"/fork {mine}": f"{mine} exists already: name a new file",
        f"/save {tmp_path}": f"{tmp_path} is a directory: name a session file",
        f"/fork {none / 's'}": f"cannot write {none / 's'}: there is no directory {none}",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        said = remarks(chat(*wrong, "the", flags=()))
    assert said == [f"error: {why}" for why in wrong.values()]
    assert text() == "the and"
    assert mine.read_text() == "dear to me"


def test_file_that_may_not_be_read(chat, word, text, folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(import_module("inplace_ttt.cli.read"), "open", refuse, raising=False)
    assert remarks(chat(f"/read {folder.text}", "the", flags=())) == [f"error: {folder.text}: Permission denied"]
    assert text() == "the and"


def test_too_short_to_score(chat):
    assert "that is too short" in remarks(chat("/score a"))[0]


def test_line_that_is_not_utf8(cli, folder, word, tokenizer, path):
    result = cli("chat", "--session", path, "--model", folder.model, input=b"caf\xe9 the\nfile\n")
    assert result.exit_code == 0
    assert tokenizer.decode(fed(path, folder.model)) == "caf\ufffd the and\nfile and"


def test_disk_that_is_full(cli, folder, word, path, monkeypatch):
    """/quit stays, so that another place can be named; the end of input cannot."""
    real = import_module("inplace_ttt.session.files").save_file

    def full(tensors, name, **options):
        if path.name in str(name):
            raise OSError(28, "no space left")
        return real(tensors, name, **options)

    monkeypatch.setattr("inplace_ttt.session.files.save_file", full)
    other = path.with_name("other")
    result = cli("chat", "--session", path, "--model", folder.model, input=f"the\n/quit\n/save {other}\n/quit\n")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[3:] == [f"error: cannot write {path}: no space left", f"saved: {other}"]
    result = cli("chat", "--session", path, "--model", folder.model, input="the\n")
    assert result.exit_code == 2
    assert result.stderr.endswith(f"error: cannot write {path}: no space left\n")
    assert [p.name for p in path.parent.iterdir()] == ["other"]


def test_turn_that_fails_leaves_nothing(chat, word, text, monkeypatch):
    """An error in the middle of an answer."""
    from inplace_ttt import UserError

    writing = import_module("inplace_ttt.session.sampling").Sampler.__call__
    count = []

    def fail(*arguments):
        count.append(1)
        if len(count) == 4:
            raise UserError("the context is full")
        return writing(*arguments)

    monkeypatch.setattr("inplace_ttt.session.sampling.Sampler.__call__", fail)
    result = chat("the", "file", "/history", flags=())
    assert "error: the context is full" in remarks(result)
    assert remarks(result)[-2:] == ["user: the", "assistant:  and"]
    assert text() == "the and"


def test_control_characters_reach_no_terminal(folder, tokenizer):
    control = import_module("inplace_ttt.cli.chat").CONTROL
    assert control.sub("?", "a\x1b[2Jb\x07\x9b\n\tc\u00e9") == "a?[2Jb??\n\tc\u00e9"
