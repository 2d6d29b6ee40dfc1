"""Losses on documents: pieces equal one call, positions, updates on and off, intervals."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import inplace_ttt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import (
    Text,
    bootstrap_mean,
    evaluate_documents,
    loss_by_position,
    position_edges,
    token_losses,
)

V, T = 40, 60


def tiny_model(ttt: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "sliding_window": 8}
    config = AutoConfig.for_model(
        "mistral", vocab_size=V, hidden_size=32, intermediate_size=48, num_key_value_heads=2, **settings
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    if ttt:
        inplace_ttt.attach(model, inplace_ttt.InPlaceTTTConfig(layers="0::1", chunk_size=8, lr=2000.0))
        for name, parameter in model.named_parameters():
            if "ttt_conv" in name:
                torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(V, (3, T))


@pytest.mark.parametrize("ttt", [False, True])
def test_losses_are_minus_log_probabilities(ids: torch.Tensor, ttt: bool) -> None:
    model = tiny_model(ttt)
    losses = token_losses(model, ids)
    with torch.no_grad():
        log_p = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert losses.shape == (3, T - 1)
    assert losses.dtype == torch.float32
    for b, t in ((0, 1), (1, 30), (2, T - 1)):
        assert losses[b, t - 1] == pytest.approx(-float(log_p[b, t - 1, ids[b, t]]), abs=1e-5)


@pytest.mark.parametrize("piece", [1, 7, 8, 59, 60, 1000])
@pytest.mark.parametrize("ttt", [False, True])
def test_reading_in_pieces_changes_nothing(ids: torch.Tensor, ttt: bool, piece: int) -> None:
    model = tiny_model(ttt)
    torch.testing.assert_close(token_losses(model, ids, piece), token_losses(model, ids), atol=1e-4, rtol=1e-4)


def test_updates_change_the_losses_after_the_first_chunk_only(ids: torch.Tensor) -> None:
    model = tiny_model(True)
    on = token_losses(model, ids, 16)
    with inplace_ttt.updates_off(model):
        off = token_losses(model, ids, 16)
    # Chunks of 8: token 9 is the first whose logits (at token 8) come from updated weights.
    torch.testing.assert_close(on[:, :8], off[:, :8])
    assert (on[:, 8:] - off[:, 8:]).abs().max() > 0.01


def test_one_token_is_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        token_losses(tiny_model(False), torch.zeros(1, 1, dtype=torch.long))


def test_buckets_go_by_position_in_the_document() -> None:
    losses = torch.arange(1.0, 8.0).repeat(2, 1)  # the token at position t has loss t
    buckets = loss_by_position(losses, [0, 2, 4, 8, 16])
    assert [(b.start, b.end, b.loss, b.tokens) for b in buckets] == [
        (0, 2, 1.0, 2),
        (2, 4, 2.5, 4),
        (4, 8, 5.5, 8),
    ]
    assert position_edges(2048) == [0, 256, 512, 1024, 2048]
    assert position_edges(300) == [0, 256, 300]


def texts(count: int, length: int, seed: int = 0) -> list[Text]:
    generator = np.random.default_rng(seed)
    return [Text(f"d{i}", generator.integers(0, V, length + i).astype(np.uint16)) for i in range(count)]


def test_domains_windows_and_means() -> None:
    model = tiny_model(True)
    documents = {"a": texts(3, 2 * T), "b": [*texts(1, T, 1), Text("short", np.zeros(T - 1, np.uint16))]}
    results = evaluate_documents(model, documents, T, piece=16, batch_size=4, edges=[0, 8, T])
    a, b = results["a"], results["b"]
    assert (a.windows, a.tokens, b.windows, b.document_names) == (6, 6 * (T - 1), 1, ["d0"])
    windows = torch.stack([torch.from_numpy(t.ids.astype(np.int64))[i : i + T] for t in documents["a"] for i in (0, T)])
    expected = token_losses(model, windows)
    assert a.on.value == pytest.approx(float(expected.mean()), abs=1e-4)
    assert a.document_on == pytest.approx(expected.view(3, -1).mean(1).tolist(), abs=1e-4)
    assert [bucket.tokens for bucket in a.position_on] == [6 * 7, 6 * (T - 8)]
    assert a.off is not None
    assert a.gain is not None
    assert a.position_off is not None
    assert a.gain.value == pytest.approx(a.off.value - a.on.value)
    assert a.position_off[0].loss == pytest.approx(a.position_on[0].loss, abs=1e-4), "the first chunk reads alike"
    assert a.on.low <= a.on.value <= a.on.high
    json.dumps({name: result.to_dict() for name, result in results.items()})


def test_most_windows_of_a_document() -> None:
    results = evaluate_documents(tiny_model(False), {"a": texts(2, 3 * T)}, T, 1, piece=None)
    assert results["a"].windows == 2
    assert results["a"].off is None, "a plain model has no updates to switch off"


def test_every_module_keeps_its_mode() -> None:
    model = tiny_model(False).train()
    frozen = model.get_input_embeddings().eval()
    evaluate_documents(model, {"a": texts(1, T)}, T)
    assert model.training
    assert not frozen.training


def test_document_shorter_than_the_window_is_refused() -> None:
    with pytest.raises(UserError, match="a: no document has the 60 tokens"):
        evaluate_documents(tiny_model(False), {"a": texts(1, 10)}, T)


def test_interval_covers_documents_not_tokens() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        values = generator.normal(2.0, 0.5, 40)
        mean = bootstrap_mean(values, np.full(40, 16_383), seed)
        assert 0.15 < mean.high - mean.low < 0.5, "the number of tokens does not narrow it"
        covered += mean.low <= 2.0 <= mean.high
    assert 88 <= covered <= 99
    weighted = bootstrap_mean(np.array([1.0, 3.0]), np.array([3.0, 1.0]))
    assert weighted.value == pytest.approx(1.5)
