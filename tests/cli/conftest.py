"""A tiny random model whose updates change its output, its tokenizer, and a text; run the commands on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import NAMES, tiny, with_updates
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([words], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


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


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs a command line in this process."""

    def run(*arguments: object) -> Result:
        result = CliRunner(env={"COLUMNS": "100", "NO_COLOR": "1"}).invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


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
