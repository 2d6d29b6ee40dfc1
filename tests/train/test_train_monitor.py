"""The training log: sizes of the fast weights as the reference has them, MFU, memory, and the warning."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM

import inplace_ttt
from inplace_ttt.core.state import FastWeights
from inplace_ttt.hf.context import fast_weights
from inplace_ttt.train.plan import known_peak
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run
from inplace_ttt.train.schema import RecipeError
from inplace_ttt.train.sizes import TOO_LARGE, TOO_SMALL, measuring
from inplace_ttt.train.trainer import log_line

C = 16
TTT = {"layers": "0::1", "chunk_size": C, "lr": 1.0}


def model(**settings: Any) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    made = MistralForCausalLM(config)
    inplace_ttt.attach(made, inplace_ttt.InPlaceTTTConfig(**TTT | settings))
    for name, parameter in made.named_parameters():
        if "ttt_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def after(reader: MistralForCausalLM, ids: torch.Tensor) -> dict[int, FastWeights]:
    """The fast weights that a cache holds after reading ``ids``."""
    with torch.no_grad():
        return fast_weights(reader(ids, use_cache=True).past_key_values)


@pytest.mark.parametrize("settings", [{}, {"decay": 0.2, "clip": 0.02, "clip_relative": True}])
def test_sizes_are_those_of_the_states_that_a_cache_ends_with(settings: dict[str, Any]) -> None:
    reader = model(**settings)
    ids = torch.randint(0, 300, (2, 3 * C + 5))
    with measuring(reader) as sizes:
        reader(ids, use_cache=False).logits.sum().backward()
    for layer, block in enumerate(reader.model.layers):
        weight = block.mlp.down_proj.weight.detach().norm()
        states = [after(reader, ids[:1, : n * C])[layer].S for n in (1, 2, 3)]
        largest = max(float(S.norm() / weight) for S in states)
        assert float(sizes[layer].state) == pytest.approx(largest, rel=1e-4)
        if not settings:
            assert float(sizes[layer].updates[0]) == pytest.approx(float(states[0].norm() / weight), rel=1e-4)
            assert len(sizes[layer].updates) == 3


def test_packed_documents_start_anew() -> None:
    reader = model()
    ids = torch.randint(0, 300, (1, 5 * C))
    positions = torch.cat([torch.arange(2 * C), torch.arange(3 * C)])[None]
    with measuring(reader) as sizes, torch.no_grad():
        reader(ids, position_ids=positions, use_cache=False)
    for layer, block in enumerate(reader.model.layers):
        read = [after(reader, ids[:, start:end])[layer].S for start, end in ((0, C), (2 * C, 3 * C), (2 * C, 4 * C))]
        largest = max(float(S.norm() / block.mlp.down_proj.weight.detach().norm()) for S in read)
        assert float(sizes[layer].state) == pytest.approx(largest, rel=1e-4)


def train(values: dict[str, Any]) -> dict[str, Any]:
    output = run(make_recipe(values), console=Console(quiet=True))
    return dict(json.loads((output / "run.json").read_text()))


def test_log_has_sizes_mfu_and_memory(values: dict[str, Any]) -> None:
    changes = {"ttt": TTT, "peak_tflops": 0.01, "log_every": 4, "gradient_accumulation": 2}
    record = train(values | changes | {"activation_checkpointing": True})
    assert [entry["step"] for entry in record["curve"]] == [4, 8]
    for entry in record["curve"]:
        for layer in (0, 1):
            assert 0 < entry[f"update_norm/layer_{layer}"] < entry[f"state_norm/layer_{layer}"] < 1
        assert entry["peak_memory_gib"] > 0.01
    last = record["curve"][-1]
    per_second = last["mfu"] * 0.01e12 / last["tokens_per_second"]
    assert per_second == pytest.approx(6 * record["parameters"], rel=0.6), "six FLOPs a parameter and token, and more"
    assert record["mfu"] == last["mfu"]
    line = log_line(last)
    assert f"MFU {last['mfu']:.1%}" in line
    assert "S/W0 " in line
    assert record["warnings"] == []


def test_mfu_is_absent_where_the_peak_is_unknown(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    record = train(values | {"steps": 3})
    assert record["mfu"] is None
    assert not any("mfu" in entry or "state_norm/layer_0" in entry for entry in record["curve"])
    with pytest.raises(RecipeError, match=r"peak_tflops: 0\.0 must be above 0"):
        make_recipe(values | {"peak_tflops": 0})


def test_a_family_with_other_names_is_trained_and_counted(values: dict[str, Any]) -> None:
    values["model"] = {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}}
    record = train(values | {"ttt": TTT, "steps": 3, "peak_tflops": 0.01, "log_every": 3, "evaluation": {"piece": 64}})
    (entry,) = record["curve"]
    assert entry["state_norm/layer_1"] >= 0
    assert "mfu" not in entry, "one line of the log has no interval"


def test_measuring_changes_no_loss(values: dict[str, Any], tmp_path: Path) -> None:
    records = [
        train(values | {"ttt": TTT, "steps": 24, "log_every": n, "output": str(tmp_path / str(n))}) for n in (1, 24)
    ]
    assert records[0]["curve"][-1]["grad_norm"] == records[1]["curve"][-1]["grad_norm"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 1.0, "target": "input_embed"}, None),
        ({"lr": 100.0, "target": "hidden_states"}, rf"more than {TOO_LARGE:g}\): training may diverge, lower ttt.lr"),
        ({"lr": 1e-7}, rf"less than {TOO_SMALL:g}\): it will do next to nothing, raise ttt.lr"),
    ],
)
def test_first_updates_of_an_odd_size_are_told(
    values: dict[str, Any], changes: dict[str, Any], message: str | None
) -> None:
    """Measured on a fresh model, whose convolution is zero, and in the first of several warm-up steps."""
    values["model"]["config"] |= {"hidden_size": 64, "intermediate_size": 192}
    record = train(values | {"ttt": TTT | {"chunk_size": 32} | changes, "steps": 4, "ttt_lr_warmup_steps": 3})
    if message is None:
        assert record["warnings"] == []
    else:
        (warning,) = record["warnings"]
        assert re.search(message, warning), warning
        assert "\n" not in warning


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "fp32", 156),
        ("NVIDIA GeForce RTX 4090", "bf16", 165),
        ("Some Other GPU", "bf16", None),
    ],
)
def test_known_devices(name: str, precision: str, tflops: float | None) -> None:
    assert known_peak(name, precision) == (tflops and tflops * 1e12)
