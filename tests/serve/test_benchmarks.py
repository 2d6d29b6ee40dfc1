"""The benchmarks of serving run at a tiny size."""

import importlib.util
import json
import os

import torch
from locations import ROOT
from serve.running import Running
from session.models import shipped, tokenizer


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_streams(tmp_path):
    out = tmp_path / "streams.json"
    load("serve_streams").main(
        ["--shapes", "tiny", "--streams", "1,3", "--tokens", "12", "--window", "16", "--out", f"{out}"]
    )
    rows = json.loads(out.read_text())["rows"]
    kinds = [(row["state"], row["streams"]) for row in rows]
    assert kinds == [
        ("dense", 1), ("dense", 3), ("dense, one after another", 3), ("no fast weights", 1), ("no fast weights", 3),
        ("pairs", 1), ("pairs", 3),
    ]  # fmt: skip
    assert all(row["tokens_per_second"] > 0 for row in rows)
    dense, pairs = rows[1], rows[6]
    assert 1 < dense["bytes_allow"] < 3
    assert pairs["state_bytes"] < dense["state_bytes"]


def test_load(tmp_path):
    """A few seconds of the five minutes: answers as in the library, no session lost, garbage refused."""
    module = load("serve_load")
    with Running(tmp_path, shipped_model=True, limits={"memory": 40 << 20}) as server:
        clients, found = module.load(server.url, 5, 4, os.getpid())
    assert found["wrong_status"] == []
    assert found["lost_sessions"] == []
    assert found["garbage_sent"] > 5
    compared, wrong = module.check(clients, shipped(torch.float32), tokenizer())
    assert wrong == []
    assert compared
