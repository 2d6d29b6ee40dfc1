"""The command is there, names itself, and does not make people wait for --help."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


MISTAKES = {
    "train tiny-gpu": "tiny-gpu: no such file, nor a recipe of that name",
    "train tiny-cpu stepz=3": "stepz: no such setting, did you mean steps?",
    "train tiny-cpu optimizer.lr=7": "optimizer.lr: 7.0 must lie between 0 and 1",
    "train tiny-cpu ttt.chunk_size=0": "ttt: chunk_size must be at least 1, got 0",
    "train tiny-cpu data.train.text=jsonl:none.jsonl": "none.jsonl: no such file",
    "train tiny-cpu model.base=./none model.config=null tokenizer.train=null": "there is no directory ./none",
    "train tiny-cpu parallel.shard=7": "batch_size",
    "train tiny-cpu --plan --tflops 0": "--tflops and --bandwidth must be above 0",
    "train tiny-cpu --resume": "nothing to resume: there is no checkpoint in",
    "train tiny-cpu output=done": "done holds a run already: add --resume",
    "train tiny-cpu ttt.objective=none": "ttt: objective must be one of learned",
    "train tiny-cpu ttt.rule=none": "ttt: rule must be one of adaptive",
    "train tiny-cpu tokenizer.train.vocab_size=9": "tokenizer.train.vocab_size",
    "tokenizer text:none.txt -o new": "text:none.txt: no such file",
    "tokenizer books -o new": "'books' is not a document source",
    "tokenizer text:text -o text": "text is a file: name a directory",
    "tokenizer text:text -o new --vocab-size 9": "Invalid value for '--vocab-size'",
    "tokenizer text:text -o new --max-bytes 0": "Invalid value for '--max-bytes'",
    "convert none new --to model": "no model directory at none",
    "convert text new --to model": "no model directory at text",
    "convert folder new --to model": "folder holds no model",
    "convert settings folder --to adapter": "folder exists already: choose another directory",
    "convert settings new --to model --base ./none": "no model directory at ./none",
    "convert shards new --to model": "shards holds tensors only",
    "convert shards new --to model --config none": "no model directory at none",
    "bench mlp --shape 7b": "--shape 7b: choose one of tiny",
    "bench mlp --plot x.png": "--plot: only for prefill",
    "bench prefill --plot x.gif": "the name must end in .png",
    "bench prefill --out folder": "folder is a directory: name a file",
    "bench train --window 8": "--window: only for prefill and stream",
    "bench decode --tokens 8,16": "decode takes one length",
    "bench prefill --chunks 8,16": "prefill takes one chunk size",
    "bench mlp --tokens many": "--tokens many: write whole numbers",
    "bench prefill --tokens 0": "--tokens 0: only numbers of at least 1",
    "read none.txt --session s": "none.txt: no such file",
    "read text --session s --state sparse": "--state sparse: dense, auto, or a rank",
    "read text --session none/s": "there is no directory",
    "read text --session text --window 8": "text exists, and --window is for a new session",
    "read text --session s --model ./none": "no model directory at ./none",
    "read text --session s --model none.gguf": "none.gguf: no such file",
    "read text --session text": "text is not a complete session file",
    "read text --session other": "other is not a session file: it is a safetensors file of something else",
    "read text --session s --model folder": "folder holds no model: it has neither inplace_ttt.json nor config.json",
    "read text --session s --model broken": "config.json is damaged",
    "read text --session s --decay 7": "decay must be in [0, 1), got 7",
    "read text --session s --objective none": "objective must be one of learned",
    "read text --session moved": "moved was made with the model ./gone: no model directory at ./gone. Say where it is",
    "chat --session none/s": "there is no directory",
    "chat --model ./none": "no model directory at ./none",
    "chat --model folder": "folder holds no model",
    "chat --session text": "text is not a complete session file",
    "chat --session newer": "newer has format version 3, this inplace-ttt reads 2: update inplace-ttt",
    "chat --objective none": "objective must be one of learned",
    "chat --top-p 3": "--top-p 3: above 0, at most 1",
    "chat --repetition-penalty 0": "--repetition-penalty 0: above 0",
    "eval": "--data: name at least one text file",
    "eval --data none.txt": "none.txt: no such file",
    "eval --data hf:x?splits=test": "no setting 'splits'",
    "eval --data text --suite nil": "--suite nil: choose from",
    "eval --data text --sweep lr=fast": "--sweep lr=fast",
    "eval --data text --sweep decay=7": "decay must be in [0, 1), got 7",
    "eval --data text --sweep chunk_size=64,0": "chunk_size must be at least 1, got 0",
    "eval --data text --kinds none": "no kind of needle 'none', only single",
    "eval --data text --depths 2": "depths [2.0]: at least one, each from 0 to 1",
    "eval --data text --lengths 0": "lengths [0]: at least one, each of 1 token or more",
    "eval --suite ruler --questions none.json": "none.json: no such file",
    "eval --suite ruler --questions text": "text: not JSON",
    "eval --data text --objective none": "objective must be one of learned",
    "eval --data text --baseline ./none": "no model directory at ./none",
    "eval folder --data text": "folder holds no model",
    "eval --data text --baseline folder": "folder holds no model",
    "eval --data text --out text": "text is a file: name a directory",
    "demo none.txt": "none.txt: no such file",
    "demo --plot x.gif": "the name must end in .png",
    "demo --model ./none": "no model directory at ./none",
    "demo --model folder": "folder holds no model",
    "demo --model untyped": "config.json names no model_type",
    "demo --objective none": "objective must be one of learned",
    "inspect none.gguf": "none.gguf: no such file",
    "inspect text.gguf": "text.gguf is not a GGUF file",
    "serve text.gguf": "text.gguf is not a GGUF file",
    "serve --state-dir text": "--state-dir text: not a directory",
    "serve --adapter-dir text": "--adapter-dir text: not a directory",
    "train folder": "folder: a directory, nor a recipe of that name",
    "inspect ./none": "no model directory at ./none",
    "inspect folder": "folder holds no model",
    "inspect broken": "config.json is damaged",
    "inspect untyped": "config.json names no model_type",
    "inspect settings": "inplace_ttt.json is damaged",
    "inspect text": "text is not a complete session file",
    "inspect model --objective none": "objective must be one of learned",
    "inspect model --chunk-size 0": "chunk_size must be at least 1, got 0",
    "inspect model --layers two": "--layers two: write a slice",
    "inspect model --layers two:": 'layers must be a slice such as "0::6"',
    "inspect model --target x": "target must be one of input_embed",
    "serve folder": "folder holds no model",
    "serve --learn none,all": "--learn none,all: one of all, read",
    "serve --decay 9": "decay must be in [0, 1), got 9",
    "serve --layers 0::3": "layers: for a plain model only, which needs an objective too",
    "serve model --objective none": "objective must be one of learned",
    "serve model --objective loss --layers two": 'layers must be a slice such as "0::6"',
    "serve --state sparse": "--state sparse: dense, auto, or a rank",
    "serve ./none": "no model directory at ./none",
    "-h": "Usage: inplace-ttt",
    "read -h": "--session",
    "--version": "inplace-ttt ",
    "--show-completion bash": "",
}
"""Command lines, and what they are told."""


def _header(**metadata: str) -> bytes:
    """Return a safetensors file without tensors."""
    text = json.dumps({"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


def test_mistakes_are_told_before_torch_is_imported(tmp_path):
    """All in one new process, which then looks at what was imported."""
    program = (
        "import io, json, sys\nfrom contextlib import redirect_stderr, redirect_stdout\n"
        "from inplace_ttt.cli import main\n"
        "found = {}\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    sys.argv, said = ['inplace-ttt', *line.split()], io.StringIO()\n"
        "    with redirect_stdout(said), redirect_stderr(said):\n"
        "        try: main()\n"
        "        except SystemExit as end: code = end.code\n"
        "    slow = sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules))\n"
        "    found[line] = [code, said.getvalue(), slow]\n"
        "print(json.dumps(found))"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("some text")
    (tmp_path / "text.gguf").write_text("some text")
    (tmp_path / "other").write_bytes(_header(format="pt"))
    (tmp_path / "newer").write_bytes(_header(format="inplace_ttt_session", version="3"))
    moved = {"format": "inplace_ttt_session", "version": "2", "header": json.dumps({"origin": "./gone"})}
    (tmp_path / "moved").write_bytes(_header(**moved))
    for name in ("model/config.json", "broken/config.json", "untyped/config.json", "settings/inplace_ttt.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text({"model": '{"model_type": "llama"}', "untyped": "{}"}.get(name.split("/")[0], "{"))
    for name in ("done/run.json", "shards/.metadata"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    # No shell may be among the parents, so that it cannot be looked for.
    environment = os.environ | {"COLUMNS": "200", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(MISTAKES))],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, (code, said, slow) in json.loads(done.stdout).items():
        assert slow == [], line
        assert MISTAKES[line] in said, line
        assert code == (0 if MISTAKES[line] in ("", "Usage: inplace-ttt", "--session", "inplace-ttt ") else 2), line


@pytest.mark.parametrize("command", ["--version", "--help", pytest.param("inspect", marks=pytest.mark.slow)])
def test_a_closed_pipe_is_no_traceback(folder, command):
    """As in ``inplace-ttt inspect | head -1``."""
    arguments = [command, folder.model] if command == "inspect" else [command]
    process = subprocess.Popen([COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


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
