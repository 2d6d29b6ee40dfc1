"""--help of the session commands: one line an option, defaults where there are some, and no waiting for torch."""

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", ["read", "chat", "inspect"])
def test_one_line_an_option(cli, command):
    printed = cli(command, "--help", columns=80).stdout
    options = printed.split("Options:\n")[1].rstrip("\n").splitlines()
    assert len(options) >= 7
    for line in options:
        assert re.match(r"  (-h, )?--[a-z-]+ +(<[a-z ]+> +)?\S", line), line
        assert len(line) <= 80


def test_defaults_are_shown(cli):
    printed = cli("chat", "--help", columns=80).stdout
    for option, default in (("max-tokens", "200"), ("temperature", "0.7"), ("top-p", "0.95")):
        assert re.search(rf"--{option} .*\[default: {default}[;\]]", printed)


def test_no_line_is_cut(cli):
    """Of the list of commands, nor a kind of needle in the middle."""
    commands = cli("--help", columns=80).stdout.split("Commands:\n")[1]
    assert len(commands.splitlines()) == 10
    assert "..." not in commands
    assert "multi-\n" not in cli("eval", "--help", columns=80).stdout


def test_without_torch():
    program = (
        "import sys\nfrom inplace_ttt.cli import main\ntry: main()\n"
        "except SystemExit: print(*{'torch', 'transformers', 'jinja2', 'safetensors'} & set(sys.modules), 'end')"
    )
    for command in ("read", "chat", "inspect"):
        done = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "end"
