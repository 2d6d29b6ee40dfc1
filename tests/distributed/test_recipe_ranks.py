"""Recipes on several processes: every layout logs one process's losses, and goes on from any other's checkpoint."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_ranks import interrupted, runs
from safetensors.torch import load_file
from spawn import free_port, run_ranks

from inplace_ttt.config import InPlaceTTTConfig
from inplace_ttt.errors import UserError
from inplace_ttt.train.recipe import make_recipe

C = 16


def _text(seed: int) -> str:
    generator = random.Random(seed)
    words = ["".join(generator.choice("abcde") for _ in range(3)) for _ in range(30)]
    return " ".join(generator.choice(words) for _ in range(generator.randint(40, 900)))


@pytest.fixture
def folder(run_root: Path) -> Path:
    return run_root / "recipes"


def recipe(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "output": str(folder / name),
        "model": {
            "config": {
                "model_type": "mistral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "sliding_window": 24,
                "tie_word_embeddings": True,
            }
        },
        "ttt": {"layers": "0::1", "chunk_size": C, "lr": 1000.0, "init_std": 0.3},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {
            "train": {"text": f"jsonl:{folder / 'train.jsonl'}"},
            "validation": {"text": f"jsonl:{folder / 'held.jsonl'}"},
            "cache": str(folder / "tokens"),
        },
        "optimizer": {"lr": 5e-3, "warmup_steps": 2},
        "sequence_length": 128,
        "steps": 4,
        "batch_size": 2,
        "gradient_accumulation": 2,
        "align_documents": True,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 2,
        "evaluation": {"rows": 2},
        "parallel": {},
        "activation_checkpointing": True,
    } | changes


def losses(curve: list[dict[str, float]], key: str = "loss") -> dict[int, float]:
    return {int(entry["step"]): entry[key] for entry in curve if key in entry}


@pytest.fixture
def results(once: Any) -> Any:
    return once("recipes", train_all)


def train_all(folder: Path) -> dict[str, Any]:
    """Runs of one process, of two (by layout), and what the two go on with."""
    lines = [json.dumps({"id": str(seed), "text": _text(seed)}) for seed in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "held.jsonl").write_text(lines[0], encoding="utf-8")
    alone = recipe(folder, "alone")
    found: dict[str, Any] = {"alone": runs([(alone, False, 0)])[0]}
    layouts = {"shard": {"shard": 2}, "context": {"context": 2}}
    several = [
        (recipe(folder, name, parallel=sizes, activation_checkpointing=name == "shard"), False, free_port())
        for name, sizes in layouts.items()
    ]
    bf16 = recipe(folder, "bf16", parallel={"shard": 2}, precision="bf16")
    resumed = interrupted(folder / "alone", 2, folder / "resumed")
    go_on = recipe(folder, "resumed", parallel={"context": 2}, activation_checkpointing=False)
    wrong = recipe(folder, "wrong", parallel={"context": 4})
    base = {"model": {"base": str(folder / "alone/model/base")}, "tokenizer": {"path": str(folder / "alone/model")}}
    found["from base"] = runs([(recipe(folder, "from base", **base), False, 0)])[0]
    half = interrupted(folder / "from base", 2, folder / "tensor")
    tensor = recipe(folder, "tensor", parallel={"tensor": 2}, **base)
    assert half.is_dir()
    taught = {
        "optimizer": {"lr": 5e-3, "ttt_lr": 2e-2, "warmup_steps": 2}, "teach": 1.0,
        "ttt": alone["ttt"] | {"lr": 1.0, "objective_options": {"start": "next_token"}, "init_std": None},
    }  # fmt: skip
    found["taught alone"] = runs([(recipe(folder, "taught alone", **taught), False, 0)])[0]
    assert interrupted(folder / "taught alone", 2, folder / "taught back").is_dir()
    several += [
        (recipe(folder, name, **taught, parallel={"shard": 2}), name != "taught", free_port())
        for name in ("taught", "taught back")
    ]
    several += [(bf16, False, free_port()), (go_on, True, free_port())]
    fitted = {"ttt": {k: v for k, v in alone["ttt"].items() if k != "lr"}, "ttt_relative_update": 0.1}
    found["fitted alone"] = runs([(recipe(folder, "fitted alone", **fitted), False, 0)])[0]
    layout = {"context": 2}
    several += [(recipe(folder, "fitted", **fitted, parallel=layout), False, free_port())]
    (folder / "bad.jsonl").write_text('{"text": 3}\n', encoding="utf-8")
    unreadable = recipe(folder, "unreadable", parallel={"shard": 2})
    unreadable["data"]["train"] = {"text": f"jsonl:{folder / 'bad.jsonl'}"}
    several += [(tensor, True, free_port()), (wrong, False, free_port()), (unreadable, False, free_port())]
    names = [*layouts, "taught", "taught back", "bf16", "resumed", "fitted", "tensor", "wrong", "unreadable"]
    assert resumed.is_dir()
    two = run_ranks("recipe_ranks", "runs", 2, several)
    found |= dict(zip(names, two[0], strict=True))
    found["others"] = dict(zip(names, two[1], strict=True))
    interrupted(folder / "context", 2, folder / "back")
    found["back"] = runs([(recipe(folder, "back"), True, 0)])[0]
    return found


@pytest.mark.parametrize("name", ["shard", "context", "resumed", "back", "tensor"])
def test_logs_the_losses_of_one_process(name: str, results: dict[str, Any]) -> None:
    expected, got = results["from base" if name == "tensor" else "alone"], results[name]
    assert not isinstance(got, str), got
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 2e-4), ("eval_text", 2e-5), ("eval_text_off", 2e-5)):
        assert losses(got, key).keys() == losses(expected, key).keys()
        for step, value in losses(expected, key).items():
            assert losses(got, key)[step] == pytest.approx(value, abs=tolerance), (key, step)
    assert losses(expected)[4] < losses(expected)[1] - 0.05
    assert abs(losses(expected, "eval_text")[4] - losses(expected, "eval_text_off")[4]) > 1e-3, "updates do nothing"


@pytest.mark.parametrize("name", ["taught", "taught back"])
def test_teaches_and_resumes_like_one_process(name: str, results: dict[str, Any]) -> None:
    """With a learning rate of the target's own, whose groups the checkpoint of another layout has in other numbers."""
    expected, got = results["taught alone"], results[name]
    assert not isinstance(got, str), got
    for key, tolerance in (("loss", 2e-5), ("grad_norm", 2e-4), ("learning_rate", 1e-12), ("ttt_learning_rate", 1e-12)):
        assert losses(got, key).keys() == losses(expected, key).keys()
        for step, value in losses(expected, key).items():
            assert losses(got, key)[step] == pytest.approx(value, abs=tolerance), (key, step)
    assert 0 < losses(got, "ttt_cosine")[4] < 1


def test_logs_the_sizes_of_the_fast_weights(results: dict[str, Any]) -> None:
    for key in ("update_norm/layer_0", "update_norm/layer_1", "state_norm/layer_0", "state_norm/layer_1"):
        expected = losses(results["alone"], key)
        assert [step for step, value in expected.items() if value == 0] == [1, 2]  # the convolution starts at zero
        assert losses(results["shard"], key) == pytest.approx(expected, rel=1e-3)
        assert len(losses(results["context"], key)) == (4 if key.startswith("update") else 0)
        assert max(losses(results["tensor"], key)) == 2, "of the run in one process that it goes on from"


def test_several_processes_choose_the_inner_lr_of_one(folder: Path, results: dict[str, Any]) -> None:
    found = [
        json.loads((folder / name / "model" / "inplace_ttt.json").read_text())["inplace_ttt"]["lr"]
        for name in ("fitted alone", "fitted")
    ]
    assert found[0] == found[1] != InPlaceTTTConfig().lr
    assert losses(results["fitted"]) == pytest.approx(losses(results["fitted alone"]), abs=2e-5)


def test_mixed_precision_learns_alike(results: dict[str, Any]) -> None:
    assert losses(results["bf16"])[4] == pytest.approx(losses(results["alone"])[4], abs=0.05)


@pytest.mark.parametrize("name", ["shard", "context", "resumed", "bf16", "tensor"])
def test_leaves_the_whole_model(name: str, folder: Path, results: dict[str, Any]) -> None:
    def weights(run: str) -> dict[str, torch.Tensor]:
        files = sorted((folder / run / "model").rglob("*.safetensors"))
        return {f"{file.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}

    expected, got = weights("from base" if name == "tensor" else "alone"), weights(name)
    assert got.keys() == expected.keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    tolerance = 0.03 if name == "bf16" else 2e-3
    assert all((got[k].float() - x.float()).abs().max() < tolerance for k, x in expected.items())
    assert not (folder / name / "whole").exists()
    assert sorted(path.name for path in (folder / name / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_another_number_of_processes_is_refused(results: dict[str, Any]) -> None:
    for message in (results["wrong"], results["others"]["wrong"]):
        assert "need 4 processes, 2 were started" in message
        assert "--nproc_per_node 4" in message


def test_what_the_first_process_cannot_read_is_told_by_all(results: dict[str, Any]) -> None:
    for message in (results["unreadable"], results["others"]["unreadable"]):
        assert 'bad.jsonl, line 1: no "text"' in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": {"shard": 3}}, "batch_size"),
        ({"parallel": {"shard": 0}}, "parallel.shard"),
        ({"parallel": {"shards": 2}}, "did you mean shard"),
        (
            {"parallel": {"activation_checkpointing": True}},
            "parallel.activation_checkpointing: no such setting",
        ),
        ({"parallel": {"context": 3}}, "multiple of 96"),
        ({"parallel": {"context": 2, "slices": "contiguous"}, "sequence_length": 144}, "multiple of 32"),
        ({"parallel": {"context": 2}, "align_documents": False}, "align_documents"),
        ({"parallel": {"context": 2}, "attn_implementation": "sdpa"}, "attn_implementation"),
        ({"parallel": {"context": 2, "attention": "torch"}}, "gather"),
        ({"parallel": {"shard": 2}, "compile": True}, "compile"),
        ({"parallel": {"tensor": 2}}, "model.base"),
        ({"parallel": {"tensor": 2, "shard": 2}}, "together"),
        ({"align_documents": True, "sequence_length": 120}, "align_documents"),
    ],
)
def test_impossible_settings_are_refused_before_anything_loads(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "held.jsonl").touch()
    with pytest.raises(UserError, match=message):
        make_recipe(recipe(tmp_path, "impossible", **changes))
    assert not (tmp_path / "impossible").exists()
