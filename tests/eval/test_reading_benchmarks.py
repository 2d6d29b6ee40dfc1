"""The benchmarks of reading: rivals learn as a loop of plain PyTorch does, the worst stretch is the worst."""

import sys

import pytest
import torch
from locations import ROOT
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from inplace_ttt.hf.cache import cache_name, cache_of

sys.path.insert(0, str(ROOT / "benchmarks"))
import reading_by_loss
import reading_rivals

CONFIG = MistralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=24, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
IDS, C = torch.randint(97, (3, 70), generator=torch.Generator().manual_seed(0)), 16


def fresh():
    torch.manual_seed(0)
    return MistralForCausalLM(CONFIG).double().eval()


def by_hand(ids, model, optimizer):
    """Losses of one row: score a chunk, one step on its mean loss, and on."""
    cache, losses, last = DynamicCache(config=CONFIG), [], None
    for at in range(0, len(ids), C):
        part = ids[None, at : at + C]
        out = model(part, use_cache=True, **{cache_name(model): cache})
        cache = cache_of(out)
        own = cross_entropy(out.logits[0, :-1].float(), part[0, 1:], reduction="none")
        if last is not None:
            losses.append(cross_entropy(last.float(), part[0, :1], reduction="none").detach())
        losses.append(own.detach())
        last = out.logits[0, -1:].detach()
        if part.shape[1] == C:
            optimizer.zero_grad()
            own.mean().backward()
            optimizer.step()
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return torch.cat(losses)


def test_all_weights_learn_as_in_plain_pytorch():
    found = reading_rivals.Reader(fresh(), "all", "sgd", 0.5, 3, C).read(IDS)
    for row, ids in zip(found, IDS, strict=True):
        model = fresh()
        torch.testing.assert_close(row, by_hand(ids, model, torch.optim.SGD(model.parameters(), lr=0.5)))


@pytest.mark.parametrize(
    ("method", "optimizer", "lr"),
    [
        ("lora", "adam", 1e-2),
        ("all", "sized", 1e-2),
        ("norms", "adam", 1e-2),
        ("last", "sgd", 1.0),
        ("head", "adam", 0.01),
    ],
)
def test_rows_of_a_rival_learn_alone(method, optimizer, lr):
    def reader(rows):
        torch.manual_seed(1)
        return reading_rivals.Reader(fresh(), method, optimizer, lr, rows, C)

    plain, _ = reading_by_loss.read(fresh(), IDS)
    together = reader(3)
    torch.testing.assert_close(together.read(IDS, learn=False), plain)
    learned = together.read(IDS)
    assert (learned - plain).abs().max() > 1e-4
    torch.testing.assert_close(learned[1:2], reader(1).read(IDS[1:2]))
    together.roll()  # every row goes on after the text of the row before it
    again = reader(3)
    again.read(IDS.roll(1, 0))
    torch.testing.assert_close(together.read(IDS), again.read(IDS))


def test_worst_stretch(monkeypatch):
    monkeypatch.setattr(reading_by_loss, "STRETCH", 3)
    worse = torch.tensor([[0.0, 1.0, 2.0, 3.0, -9.0, 0.0], [-1.0, -1.0, -1.0, -4.0, -4.0, -4.0]])
    assert reading_by_loss.stretches(worse).tolist() == pytest.approx([2.0, -1.0])
    assert reading_by_loss.stretches(worse[:, :2]).tolist() == pytest.approx([0.5, -1.0])
