"""The first process alone builds the model; after sharding all is as if every process had built it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from first_ranks import VOCAB
from spawn import run_ranks
from test_recipe_ranks import C, recipe

import inplace_ttt as ittt

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TTT = {"layers": "0::1", "chunk_size": C, "lr": 1000.0, "init_std": 0.3}
SCALED = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GPT2 = {"model_type": "gpt2", "n_embd": 33, "n_layer": 2, "n_head": 3}  # does not divide, and has dropout

CASES: dict[str, dict[str, Any]] = {
    "scratch tied": {},
    "scratch untied": {"tie": False, "parallel": {"context": 2}},
    "scratch without fast weights": {"ttt": None, "align_documents": False, "parallel": {"data": 2}},
    "scratch gpt2": {"model": {"config": GPT2}},
    "base tied": {"base": "tied"},
    "base untied, scaled": {"base": "untied", "settings": {"rope_parameters": SCALED}},
    "base frozen": {"base": "tied", "trainable": "adapter"},
    "base, projections": {"base": "untied", "trainable": "adapter_and_projections", "parallel": {"context": 2}},
    "base with fast weights": {"base": "attached", "ttt": TTT | {"lr": 500.0}},
    "damaged base": {"base": "damaged"},
    "another vocabulary": {"base": "small"},
}
REFUSED = ("damaged base", "another vocabulary")


def _values(folder: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    case = {"parallel": {"shard": 2}, "ttt": TTT} | case
    values = recipe(folder, name)
    values["model"]["config"]["tie_word_embeddings"] = case.pop("tie", True)
    if (base := case.pop("base", None)) is not None:
        values["model"] = {"base": str(folder / base), "settings": case.pop("settings", {})}
        values["tokenizer"] = {"path": str(folder)}
    return {key: value for key, value in (values | case).items() if value is not None}


def _build(folder: Path, device: str = "cpu", backend: str = "gloo") -> list[Any]:
    for name in ("train.jsonl", "held.jsonl", "tokenizer.json"):
        (folder / name).touch()
    torch.manual_seed(1)
    for name, changes in (("tied", {"tie_word_embeddings": True}), ("small", {"vocab_size": 50}), ("untied", {})):
        config = transformers.LlamaConfig(**{"tie_word_embeddings": False} | SHAPE | changes)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
    shutil.copytree(folder / "tied", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"")
    model = ittt.attach(transformers.LlamaForCausalLM(config), ittt.InPlaceTTTConfig(**TTT))
    ittt.save_pretrained(model, folder / "attached")
    recipes = {name: _values(folder, name, case) for name, case in CASES.items()}
    return run_ranks("first_ranks", "builds", 2, recipes, device, backend=backend)


@pytest.fixture
def results(once: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = once("first", _build)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_all_is_as_if_every_process_had_built_the_model(name: str, results: list[dict[str, Any]]) -> None:
    first, other = results[0][name], results[1][name]
    assert first["held"] > 0
    assert other["held"] == 0
    assert first["different"] == other["different"] == []


@pytest.mark.parametrize(
    ("name", "message"), [("damaged base", "cannot load"), ("another vocabulary", "has 97 tokens")]
)
def test_what_the_first_process_refuses_is_told_by_all(name: str, message: str, results: list[dict[str, Any]]) -> None:
    assert message in results[0][name]
    assert results[1][name] == results[0][name]
    assert "\n" not in results[0][name]


@pytest.mark.gpu
def test_the_same_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for rank, found in enumerate(_build(tmp_path, "cuda", "nccl")):
        for name in CASES.keys() - set(REFUSED):
            assert found[name]["different"] == [], name
            assert (found[name]["held"] > 0) == (rank == 0), name
