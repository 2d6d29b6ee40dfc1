"""A small corpus, a tokenizer made from it and a recipe, built once."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run


def make_text(seed: int, words: int = 3000) -> str:
    """Text that a tiny model can learn: sentences over a small vocabulary, names that return."""
    generator = random.Random(seed)
    name = "".join(generator.choice("abcdefghij") for _ in range(6))
    vocabulary = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("ne", "so", "fi", "ba")] + [name] * 4
    lines = [" ".join(generator.choice(vocabulary) for _ in range(generator.randint(3, 12))) for _ in range(words // 7)]
    return ".\n".join(lines) + ".\n"


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the losses takes longer than training; one test looks at the picture."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("inplace_ttt.train.run.plot_losses", lambda *_: None)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with train.jsonl (6 documents) and held.jsonl (2)."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, seeds in (("train", range(6)), ("held", range(100, 102))):
        lines = [json.dumps({"id": f"{name}-{seed}", "text": make_text(seed)}) for seed in seeds]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def values(corpus: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that trains a 2-layer model for 8 steps in about a second."""
    return small_recipe(corpus, tmp_path / "run", tmp_path_factory.getbasetemp() / "tokens")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of 20 steps left; for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    recipe = small_recipe(corpus, folder, tmp_path_factory.getbasetemp() / "tokens") | {"steps": 20}
    return run(make_recipe(recipe), console=Console(quiet=True))


def small_recipe(corpus: Path, output: Path, tokens: Path) -> dict[str, Any]:
    return {
        "name": "test",
        "output": str(output),
        "model": {
            "config": {
                "model_type": "mistral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "sliding_window": 16,
                "tie_word_embeddings": True,
            }
        },
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {
            "train": {"text": f"jsonl:{corpus / 'train.jsonl'}"},
            "validation": {"text": f"jsonl:{corpus / 'held.jsonl'}"},
            "test": {"text": f"jsonl:{corpus / 'held.jsonl'}"},
            "cache": str(tokens),
        },
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "sequence_length": 128,
        "steps": 8,
        "batch_size": 2,
        "log_every": 1,
        "evaluation": {"rows": 2, "windows": 2, "piece": 50, "batch_size": 2},
    }
