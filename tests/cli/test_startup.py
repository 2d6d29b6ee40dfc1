"""The command is there, names itself, and does not make people wait for --help."""

import subprocess
import sys
import time
from pathlib import Path

import inplace_ttt as ittt
from inplace_ttt.shipped import DEFAULT_MODEL

COMMAND = str(Path(sys.executable).with_name("inplace-ttt"))


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_help_is_fast_and_loads_no_torch():
    program = (
        "import os, sys\nfrom inplace_ttt.cli import main\ntry: main()\n"
        "except SystemExit: slow = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "print(*slow, os.environ['OMP_WAIT_POLICY'])"
    )
    for arguments in ([], ["demo"], ["inspect"], ["train"]):
        printed = run(sys.executable, "-c", program, *arguments, "--help")
        assert printed.splitlines()[-1] == "PASSIVE"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        printed = run(COMMAND, "--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1
    for name in ("demo", "inspect", "train"):
        assert f"\n  {name} " in printed


def test_names_of_the_command():
    assert run(COMMAND, "--version") == run(sys.executable, "-m", "inplace_ttt", "--version")
    assert run(COMMAND, "--version") == f"inplace-ttt {ittt.__version__}\n"


def test_public_names():
    """Loaded on first use, all of them there."""
    assert all(getattr(ittt, name) is not None for name in ittt.__all__)
    assert set(ittt.__all__) <= set(dir(ittt))
    assert not hasattr(ittt, "nothing")
    assert ittt.DEFAULT_MODEL == DEFAULT_MODEL
    assert Path(ittt.__file__).parent in DEFAULT_MODEL.parents
