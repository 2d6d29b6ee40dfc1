"""read, chat and inspect of sessions: a user's mistake is one line, and costs nothing that was learned."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import opened

import inplace_ttt as ittt

TEXT = "the file is read and then it is written after the block.\n" * 40


def line(result, stdout: str = "") -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    assert result.stdout == stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.session"


@pytest.fixture
def read(cli, folder, path):
    """``read`` into that session."""

    def run(*files, model=folder.model, **options):
        return cli("read", *files, "--session", path, *(("--model", model) if model else ()), **options)

    return run


@pytest.fixture
def session(read, path) -> Path:
    """A session file."""
    assert read("-", input=TEXT).exit_code == 0
    return path


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("inplace_ttt.hf.load.load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, ": no such file"),
        ("folder", " is a directory: give text files"),
        (b"", " is empty"),
        (b"ELF" * 100_000 + b"\0", " is a binary file (it has NUL bytes): give a text file"),
        ("caf\u00e9".encode("latin-1"), " is not UTF-8 text (byte 3 is 0xe9): convert it first"),
        (b"\xef\xbb\xbftext\xe9", " is not UTF-8 text (byte 7 is 0xe9): convert it first"),
        (b"x" * 2_000_000 + b"\xc3", " is not UTF-8 text (byte 2,000,000 is 0xc3): convert it first"),
    ],
)
def test_files_are_checked_before_anything_is_read(read, folder, path, tmp_path, no_model, data, says):
    """Also one in the middle of good ones."""
    bad = tmp_path / "bad.txt"
    if data == "folder":
        bad.mkdir()
    elif data is not None:
        bad.write_bytes(data)
    assert line(read(bad)) == f"{bad}{says}"
    if data != b"":
        assert line(read(folder.text, bad, folder.text)) == f"{bad}{says}"
    assert not path.exists()


def test_nothing_to_read(read, path, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("")
    assert line(read(tmp_path / "a", tmp_path / "b")) == "these files are all empty"
    assert line(read("-", input="")) == "standard input is empty: nothing was read"
    assert line(read("-", input=b"\xff")) == "standard input is not UTF-8 text (byte 0 is 0xff): convert it first"
    assert line(read("-", input=b"a\0")) == "standard input is a binary file (it has NUL bytes): give a text file"
    assert not path.exists()


def test_pipe_that_breaks_off_keeps_what_came_before(read, folder, session):
    before = opened(session, folder.model).stats().tokens
    said = line(read("-", input=TEXT.encode() * 10 + b"\xff"))
    assert said.startswith(f"standard input is not UTF-8 text (byte {10 * len(TEXT):,} is 0xff): convert it first. ")
    assert said.endswith(f"What was read before that is kept in {session}")
    assert opened(session, folder.model).stats().tokens > before + 100


@pytest.mark.parametrize("command", ["read", "chat"])
def test_place_is_checked_before_the_work(cli, folder, tmp_path, no_model, command):
    (tmp_path / "file").write_text("")
    arguments = (command, *([folder.text] if command == "read" else ()), "--session")
    assert line(cli(*arguments, tmp_path)) == f"{tmp_path} is a directory: name a session file"
    missing = tmp_path / "no" / "s"
    assert line(cli(*arguments, missing)) == f"cannot write {missing}: there is no directory {missing.parent}"
    assert line(cli(*arguments, tmp_path / "file" / "s")).startswith(f"cannot write {tmp_path / 'file' / 's'}: ")
    assert not list(tmp_path.rglob("s"))


def test_place_that_cannot_be_written(cli, folder, tmp_path, no_model, monkeypatch):
    """Of the folder, and of a file that is there."""
    where = tmp_path / "s"
    sessions = import_module("inplace_ttt.cli.sessions")
    with monkeypatch.context() as patch:
        patch.setattr(sessions.tempfile, "TemporaryFile", _raising(PermissionError(13, "Permission denied")))
        assert line(cli("read", folder.text, "--session", where)) == f"cannot write {where}: Permission denied"
    where.write_text("")
    monkeypatch.setattr(sessions, "open", _raising(PermissionError(13, "Permission denied")), raising=False)
    assert line(cli("read", folder.text, "--session", where)) == f"cannot write {where}: Permission denied"


def test_disk_that_is_full(read, folder, session, monkeypatch):
    from safetensors import SafetensorError

    before = session.read_bytes()
    for error in (SafetensorError("no space left"), OSError(28, "no space left", "x.part")):
        monkeypatch.setattr("inplace_ttt.session.files.save_file", _raising(error))
        result = read(folder.text)
        assert line(result, result.stdout) == f"cannot write {session}: no space left"
        assert session.read_bytes() == before
    assert [p.name for p in session.parent.iterdir()] == [session.name]


def _raising(error):
    def raising(*_, **__):
        raise error

    return raising


@pytest.mark.parametrize(("cut", "says"), [(100, "cut off"), (-1, "cut off"), (None, "damaged")])
def test_damaged_session(cli, folder, session, cut, says):
    data = session.read_bytes()
    session.write_bytes(data[:cut] if cut else data[:-40] + b"\xff" * 8 + data[-32:])
    for command in (("read", folder.text, "--session"), ("chat", "--session"), ("inspect",)):
        said = line(cli(*command, session))
        assert said.startswith(f"{session} is ")
        assert says in said


def test_other_file_is_no_session(cli, folder, path):
    path.write_text("something that is dear to me")
    assert "not a complete session file" in line(cli("chat", "--session", path))
    assert "not a session file" in line(cli("chat", "--session", folder.model / "base" / "model.safetensors"))
    assert path.read_text() == "something that is dear to me"


def test_session_of_another_model(cli, folder, session, tmp_path, tokenizer):
    from tiny_models import tiny, with_updates

    ittt.save_pretrained(with_updates(tiny(seed=1)), tmp_path / "other", tokenizer)
    before = session.read_bytes()
    said = line(cli("read", folder.text, "--session", session, "--model", tmp_path / "other"))
    assert said.startswith(f"{session} was written on a model with other weights (the model is {tmp_path / 'other'}; ")
    assert session.read_bytes() == before


def test_model_that_has_moved(cli, read, folder, path, tmp_path):
    """The file knows where it was; --model says where it is, once."""
    shutil.copytree(folder.model, tmp_path / "here")
    assert read("-", input=TEXT, model=tmp_path / "here").exit_code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    for command in (("read", folder.text, "--session"), ("chat", "--session"), ("inspect",)):
        said = line(cli(*command, path))
        assert said.startswith(f"{path} was made with the model {tmp_path / 'here'}: no model directory at ")
        assert said.endswith("Say where it is with --model")
    assert cli("inspect", path, "--model", tmp_path / "there").exit_code == 0
    assert read("-", input=TEXT, model=tmp_path / "there").exit_code == 0
    assert read("-", input=TEXT, model=None).exit_code == 0


def test_settings_are_for_new_sessions(cli, folder, session, no_model):
    before = session.read_bytes()
    said = line(cli("read", folder.text, "--session", session, "--window", 9, "--chunk-size", 3))
    assert (
        said == f"{session} exists, and --window, --chunk-size is for a new session: leave that out, or name a new file"
    )
    assert "--state is for a new session" in line(cli("chat", "--session", session, "--state", "dense"))
    assert session.read_bytes() == before


def test_settings_out_of_range(cli, read, folder, path):
    for state in ("nonsense", "0", "-1", "1.5"):
        said = line(cli("read", folder.text, "--session", path, "--state", state))
        assert said == f"--state {state}: dense, auto, or a rank (1 or more)"
    options = ("--session", path, "--model", folder.model)
    assert "decay must be in [0, 1)" in line(cli("read", folder.text, *options, "--decay", 7))
    assert "leave window out" in line(cli("read", folder.text, *options, "--window", 2))
    assert "--top-p 3: above 0, at most 1" in line(cli("chat", *options, "--top-p", 3))
    assert not path.exists()


def test_models_that_do_not_do(read, folder, path, tmp_path):
    assert "no tokenizer for" in line(read(folder.text, model=folder.bare))
    assert "plain model without fast weights" in line(read(folder.text, model=folder.plain))
    assert "no model directory at" in line(read(folder.text, model=tmp_path / "none"))
    assert not path.exists()


def test_usage(cli, folder):
    for arguments in (["read"], ["read", folder.text], ["read", folder.text, "--session", "s", "--window", 0]):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert "Error: " in result.stderr
        assert "Traceback" not in result.stderr


def test_session_without_the_models_name(cli, folder, tmp_path, tokenizer):
    """Saved by a program: with the shipped model there is nothing to say, else --model is needed."""
    session = ittt.Session(ittt.from_pretrained(folder.model, dtype=torch.float32).eval(), tokenizer)
    session.read(TEXT)
    session.save(tmp_path / "s")
    assert "(the model is shipped; --model names another)" in line(cli("inspect", tmp_path / "s"))
    assert cli("inspect", tmp_path / "s", "--model", folder.model).exit_code == 0


@pytest.mark.parametrize("header", [{"model": "text"}, {"model": {"fast_weights": None}}, {"origin": 5}])
def test_a_header_with_other_values_is_damaged(cli, path, header):
    metadata = {"format": "inplace_ttt_session", "version": "2", "header": json.dumps(header), "digest": "0"}
    save_file({"x": torch.zeros(1)}, path, metadata=metadata)
    assert line(cli("inspect", path)).startswith(f"{path} is damaged: its content does not match its checksum")
