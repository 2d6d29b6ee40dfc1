"""inplace-ttt bench, at sizes that a CPU does in seconds."""

import json

import pytest
import torch
from contract.families import C, adapted, tokens
from typer.testing import CliRunner

from inplace_ttt.bench import materialised, mlp
from inplace_ttt.cli import app
from inplace_ttt.errors import UserError
from inplace_ttt.fast.decoding import StepBuffers


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


def test_mlp_writes_a_record(tmp_path):
    out = tmp_path / "x" / "mlp.json"
    result = bench("mlp", "--tokens", "128", "--chunks", "32,64", "--rounds", "1", "--device", "cpu", "--out", str(out))
    assert result.exit_code == 0, result.exception
    record = json.loads(out.read_text())
    assert "forward" in result.stdout
    assert "{" not in result.stdout
    assert [(row["chunk_size"], row["pass"]) for row in record["results"]] == [
        (C, name) for C in (32, 64) for name in ("forward", "forward + backward")
    ]
    assert {"commit", "hardware", "versions", "date"} <= set(record)
    for row in record["results"]:
        assert row["over_no_ttt"]["ours"] == row["seconds"]["ours"] / row["seconds"]["no TTT"]


def test_prefill():
    result = bench("prefill", "--tokens", "96,128", "--chunks", "32", "--rounds", "1", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.exception
    assert [row["tokens"] for row in json.loads(result.stdout)["results"]] == [96, 128]


def record_of(*arguments):
    result = bench(*arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def test_a_device_that_is_not_there_is_told_in_a_line():
    result = bench("mlp", "--device", "nonsense")
    assert result.exit_code == 2
    assert "device 'nonsense' cannot be used: " in result.output


def test_prefill_draws_what_it_measured(tmp_path):
    record_of(
        "prefill",
        "--tokens",
        "64",
        "--chunks",
        "32",
        "--rounds",
        "1",
        "--window",
        "24",
        "--plot",
        str(tmp_path / "p.png"),
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_decode():
    record = record_of("decode", "--tokens", "12", "--chunks", "8", "--rounds", "2")
    row = record["results"][0]
    seconds = row["seconds_a_token"]
    assert row["graphs_over_no_ttt"] == seconds["graphs, ours"] / seconds["graphs, no TTT"]
    assert row["times_eager"] == seconds["eager, ours"] / seconds["graphs, ours"]
    assert 0 < row["difference_to_one_pass"]["ours"] < 1e-5


def test_no_speed_of_wrong_steps(monkeypatch):
    """Steps that never fold what was learned differ from one pass."""
    monkeypatch.setattr(StepBuffers, "fold", lambda self, *what: None)
    result = bench("decode", "--tokens", "12", "--chunks", "8", "--rounds", "1", "--device", "cpu")
    assert isinstance(result.exception, UserError) or result.exit_code == 2
    assert "wrong" in result.output + str(result.exception)


def test_the_formula_in_a_model_is_ours():
    model = adapted("llama")
    ids, keywords = tokens(1, 3 * C + 1), {"use_cache": False}
    with torch.no_grad():
        ours = model(ids, **keywords).logits
        with materialised.formula():
            theirs = model(ids, **keywords).logits
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=0)
    assert materialised.check(model, ids) < 1e-5


def test_no_speed_of_a_wrong_model(monkeypatch):
    """A scan whose updates never arrive."""
    real = materialised.product
    monkeypatch.setattr(materialised, "product", lambda z, v, W, n, lr: real(z, v.flip(1), W, n, lr))
    result = bench("prefill", "--tokens", "64", "--chunks", "16", "--rounds", "1", "--device", "cpu")
    assert "wrong" in result.output + str(result.exception)


def test_limits_count_the_same_products():
    shape, size = {"hidden_size": 16, "intermediate_size": 48}, mlp.Shape(16, 48, 10)
    block = 2 * 10 * 16 * 48 * 3
    assert materialised.extra_products(shape, 1, 10) == pytest.approx((mlp.limit(size, False) - 1) * block)
    forward, whole = ((mlp.limit(size, b) - 1) * (3 if b else 1) * block for b in (False, True))
    assert materialised.extra_products(shape, 1, 10, training=True) == pytest.approx(whole + forward)


def test_train():
    record = record_of("train", "--tokens", "64", "--chunks", "16", "--rounds", "1")
    speed = record["results"][0]["tokens_per_second"]
    assert record["results"][0]["of_no_ttt"] == speed["ours"] / speed["no TTT"]


def test_stream():
    record = record_of("stream", "--tokens", "400", "--chunks", "16", "--window", "32")
    parts = record["results"][0]["parts"]
    assert [part["tokens"] for part in parts] == list(range(40, 401, 40))
    assert parts[-1]["bytes_context"] == parts[1]["bytes_context"]
    assert all(norm > 0 for norm in record["results"][0]["norms"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("decode", "--tokens", "8,16"), "decode takes one length"),
        (("train", "--window", "8"), "--window: only for prefill and stream"),
        (("mlp", "--plot", "x.png"), "--plot: only for prefill"),
        (("mlp", "--tokens", "100", "--chunks", "64"), "--tokens 100: take a multiple"),
        (("mlp", "--shape", "7b"), "--shape 7b: choose one of tiny"),
        (("prefill", "--chunks", "8,16"), "prefill takes one chunk size"),
        (("mlp", "--tokens", "many"), "--tokens many: write whole numbers"),
    ],
)
def test_mistakes(arguments, says):
    result = bench(*arguments, "--device", "cpu", "--json")
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_the_materialised_formula_is_the_same_function():
    block = mlp.Block(mlp.Shape(16, 48, 64), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(block.ours(16), block.materialised(16))
    assert (block.ours(16) - block.plain()).norm() > 1e-6 * block.plain().norm()


def test_no_speed_of_wrong_results(monkeypatch):
    real = mlp.scan
    monkeypatch.setattr(
        mlp, "scan", lambda z, *a, **k: (real(z, *a, **k)[0] * (1 + 1e-3 * (z.dtype != torch.float64)), None)
    )
    with pytest.raises(UserError, match="results are wrong"):
        mlp.check(mlp.Shape(16, 48, 64), 16, torch.device("cpu"), torch.float32)
