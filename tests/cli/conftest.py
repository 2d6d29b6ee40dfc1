"""A tiny random model whose updates change its output, its tokenizer, and a text; run the commands on them."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import NAMES, byte_tokenizer, chat_tokenizer, tiny, with_updates
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import inplace_ttt as ittt
from inplace_ttt.cli import app


@pytest.fixture(scope="session")
def words() -> str:
    """A text of common words and, now and then, names."""
    rng = random.Random(0)
    common = ("the", "of", "a", "file", "and", "then", "it", "is", "written", "where", "block", "was", "read", "after")
    return "".join(
        rng.choice(NAMES if rng.random() < 0.15 else common) + rng.choice((" ", " ", " ", "\n", "(", ") ", ".\n"))
        for _ in range(700)
    )


@pytest.fixture(scope="session")
def tokenizer(words: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(words)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, words: str, tokenizer: PreTrainedTokenizerFast) -> SimpleNamespace:
    """Saved: ``model`` (attached), ``full`` (without a window), ``plain``, ``bare`` (no tokenizer); ``text``."""
    root = tmp_path_factory.mktemp("models")
    ittt.save_pretrained(with_updates(tiny()), root / "model", tokenizer)
    ittt.save_pretrained(with_updates(tiny(sliding_window=None)), root / "full", tokenizer)
    ittt.save_pretrained(with_updates(tiny()), root / "bare")
    tiny().save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    (root / "text.txt").write_text(words, encoding="utf-8")
    paths = {name: root / name for name in ("model", "full", "bare", "plain")}
    return SimpleNamespace(**paths, text=root / "text.txt")


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    """Runs a command line in this process."""

    def run(*arguments: object, input: str | bytes | None = None, columns: int = 100) -> Result:
        runner = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"})
        result = runner.invoke(app, [str(a) for a in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory, words: str) -> Path:
    """An attached model whose tokenizer has a chat template; neither says that <|im_end|> ends a text."""
    path = tmp_path_factory.mktemp("models") / "chatty"
    ittt.save_pretrained(with_updates(tiny(sliding_window=None)), path, chat_tokenizer(words))
    return path


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets models say the given tokens, whatever they predict; returns the list of those not said yet."""

    def script(*parts: Sequence[int]) -> list[int]:
        left = [token for part in parts for token in part]
        monkeypatch.setattr("inplace_ttt.session.sampling.Sampler.__call__", lambda *_: left.pop(0))
        return left

    return script


@pytest.fixture
def demo(cli: Callable[..., Result], folder: SimpleNamespace, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the demo; its figures, with what it printed under "printed" and the picture under "picture"."""

    def run(*arguments: object, model: str = "model") -> dict[str, Any]:
        figures, picture = tmp_path / "new" / "figures.json", tmp_path / "new" / "demo.png"
        options = ("--model", getattr(folder, model), "--json", figures, "--plot", picture)
        result = cli("demo", folder.text, *options, *arguments)
        assert result.exit_code == 0, result.output
        return {**json.loads(figures.read_text()), "printed": result.stdout, "picture": picture}

    return run
