"""A user's mistake is one plain line on stderr and exit code 2; Ctrl-C is 130; a bug keeps its traceback."""

import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny_models import CHUNK

import inplace_ttt as ittt
from inplace_ttt.cli.chat import HELP
from inplace_ttt.cli.usage import tell


def line(result) -> str:
    """The one line of an error."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def file(tmp_path: Path):
    def make(data: bytes) -> Path:
        path = tmp_path / "input.txt"
        path.write_bytes(data)
        return path

    return make


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x7fELF\x02\x00\x00" + b"code " * 100, "is a binary file"),
        ("na\u00efve ".encode("latin-1") * 100, "is not UTF-8 text (byte 2 is 0xef)"),
        (b"text " * 1000 + b"\xc3", "is not UTF-8 text (byte 5,000 is 0xc3)"),
    ],
)
def test_file_that_is_no_text(cli, folder, file, data, says):
    path = file(data)
    assert line(cli("demo", path, "--model", folder.model)).startswith(f"error: {path} {says}")


def test_missing_file_directory_and_device(cli, folder, tmp_path):
    missing = tmp_path / "no" / "such.txt"
    assert line(cli("demo", missing, "--model", folder.model)) == f"error: {missing}: no such file"
    assert "is a directory" in line(cli("demo", tmp_path, "--model", folder.model))
    assert "is not a regular file" in line(cli("demo", os.devnull, "--model", folder.model))


def test_short_file_says_how_many_tokens(cli, folder, file, tokenizer, tmp_path):
    """Needed: a chunk, a token that its update can change, and a token for that one to predict."""
    words, options = "the file was read and then ", ("--model", folder.model, "--plot", tmp_path / "x.png")
    ids = tokenizer(words * 10)["input_ids"]
    exact = next(n for n in range(1, 200) if len(tokenizer((words * 10)[:n])["input_ids"]) == CHUNK + 2)
    assert len(ids) > CHUNK + 2
    short = file((words * 10)[: exact - 1].encode())
    have = len(tokenizer(short.read_text())["input_ids"])
    assert have < CHUNK + 2
    said = line(cli("demo", short, *options))
    assert f"has {have} tokens" in said
    assert f"at least {CHUNK + 2} are needed" in said
    assert cli("demo", file((words * 10)[:exact].encode()), *options).exit_code == 0


def test_max_tokens_below_a_chunk(cli, folder, tmp_path):
    options = ("--model", folder.model, "--plot", tmp_path / "x.png")
    assert f"at least {CHUNK + 1} must be read" in line(cli("demo", folder.text, "--max-tokens", CHUNK, *options))
    assert cli("demo", folder.text, "--max-tokens", CHUNK + 1, *options).exit_code == 0


def test_outputs_are_checked_before_the_work(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("inplace_ttt.hf.load.load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for options, says in (
        (("--plot", tmp_path / "demo.gif"), "must end in .png, .pdf, .svg"),
        (("--plot", tmp_path / "folder.png"), "is a directory: name a file"),
        (("--json", tmp_path), "is a directory: name a file"),
        (("--json", tmp_path / "file" / "x.json"), "cannot write"),
    ):
        assert says in line(cli("demo", folder.text, "--model", folder.model, *options))


@pytest.mark.parametrize("command", ["demo", "inspect"])
def test_no_such_model(cli, folder, tmp_path, command):
    options = (folder.text, "--model") if command == "demo" else ()
    assert "no model directory at" in line(cli(command, *options, tmp_path / "none"))
    assert "holds no model" in line(cli(command, *options, tmp_path))


def test_model_that_cannot_do_it(cli, folder):
    assert "plain model without fast weights" in line(cli("demo", folder.text, "--model", folder.plain))
    assert "no tokenizer" in line(cli("demo", folder.text, "--model", folder.bare))
    assert "device 'tpu9'" in line(cli("demo", folder.text, "--model", folder.model, "--device", "tpu9"))


def test_model_that_breaks_down(cli, folder, tmp_path, tokenizer):
    model = ittt.from_pretrained(folder.model)
    with torch.no_grad():
        for layer in model.model.layers[::2]:
            layer.mlp.ttt_proj.weight.fill_(torch.nan)
    ittt.save_pretrained(model, tmp_path / "broken", tokenizer)
    said = line(cli("demo", folder.text, "--model", tmp_path / "broken", "--plot", tmp_path / "x.png"))
    assert "broken breaks down with updates on: its loss is not a number from token " in said


def test_missing_shipped_model(cli, folder, tmp_path, monkeypatch):
    for module in ("cli.demo", "hf.load"):
        monkeypatch.setattr(import_module(f"inplace_ttt.{module}"), "DEFAULT_MODEL", tmp_path / "gone")
    assert "lacks the shipped model" in line(cli("demo", folder.text))


def test_inspect_refuses(cli, folder):
    assert "no layer 7: the model has 3 layers" in line(cli("inspect", folder.plain, "--layers", "7"))
    assert "write a slice" in line(cli("inspect", folder.plain, "--layers", "two"))
    assert "chunk_size must be at least 1" in line(cli("inspect", folder.plain, "--chunk-size", 0))
    assert "target must be one of" in line(cli("inspect", folder.plain, "--target", "x"))
    assert "layers can only be set for a plain model" in line(cli("inspect", folder.model, "--layers", "0"))


def test_usage_errors(cli):
    for arguments in (["nothing"], ["demo", "--nothing"], ["demo", "--max-tokens", "0"], ["demo", "--max-tokens", "x"]):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr


def test_other_errors(cli, folder, monkeypatch):
    """Of the operating system, and what is not supported: plain. Anything else is a bug and is raised."""
    where = "inplace_ttt.text_files.read_text"
    monkeypatch.setattr(where, _raising(PermissionError(13, "Permission denied", "secret.txt")))
    assert line(cli("demo", folder.text)) == "error: secret.txt: Permission denied"
    monkeypatch.setattr(where, _raising(NotImplementedError("not with\nthis cache")))
    assert line(cli("demo", folder.text)) == "error: not with this cache"
    for bug in (ValueError("bug"), NotImplementedError(), BrokenPipeError(32, "Broken pipe")):
        monkeypatch.setattr(where, _raising(bug))
        if isinstance(bug, BrokenPipeError):
            assert cli("demo", folder.text).exit_code == 1
        else:
            with pytest.raises(type(bug)):
                cli("demo", folder.text)


def _raising(error):
    def raising(*_):
        raise error

    return raising


def test_interrupt(cli, folder, monkeypatch):
    monkeypatch.setattr("inplace_ttt.text_files.read_text", _raising(KeyboardInterrupt()))
    result = cli("demo", folder.text)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_as_processes(tmp_path):
    """The same through a real process: a mistake, and a real signal while a command runs."""
    command = [sys.executable, "-m", "inplace_ttt", "demo", str(tmp_path / "none.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'none.txt'}: no such file\n"

    program = (
        "import os, signal, time, inplace_ttt.text_files as text, inplace_ttt.cli as cli\n"
        "text.read_text = lambda *_: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9))\n"
        "cli.main()"
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = subprocess.run(
        [sys.executable, "-c", program, "demo", "x.txt"], capture_output=True, text=True, check=False, timeout=20
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_sentences_break_between_words_on_a_terminal(capsys, monkeypatch):
    sentence = "out/eval: " + "updates help by a quarter, " * 4 + "in /a/path/that-is-longer-than-the-terminal-is-wide"
    tell(sentence)
    assert capsys.readouterr().out == sentence + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((40, 24)))
    tell(sentence)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines) == sentence
    assert all(len(line) <= 40 for line in lines[:-1])
    assert lines[-1] == "/a/path/that-is-longer-than-the-terminal-is-wide"


def test_the_help_of_a_chat_fits_80_columns():
    assert max(map(len, HELP.splitlines())) <= 79
