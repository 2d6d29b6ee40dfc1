"""Peers of In-Place TTT: what they compute, documents in a row, pieces, their size, and training by a recipe."""

import sys
from typing import Any

import pytest
import torch
from locations import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "benchmarks"))

import peers
from peers import MIXERS, PeerConfig, PeerForCausalLM

TOKEN_BY_TOKEN = {"ttt_linear": peers.ttt_linear_reference, "lact": peers.lact_reference}
OPTIONS: dict[str, dict[str, Any]] = {
    "mamba2": {"head": 8, "state": 6}, "ttt_linear": {"batch": 8}, "lact": {"chunk": 8, "inner": 5, "lr": 0.3},
}  # fmt: skip


def model(mixer: str, layers: str = ":", **changes: Any) -> PeerForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 6, "tie_word_embeddings": True,
        "initializer_range": 0.3, "mixer": mixer, "mixer_layers": layers, "mixer_options": OPTIONS.get(mixer),
    }  # fmt: skip
    return PeerForCausalLM(PeerConfig(**(values | changes))).double().eval()


def logits(made: Any, ids: Tensor, **given: Any) -> Tensor:
    found: Tensor = made(ids, **given).logits
    return found


def ids(tokens: int, rows: int = 2) -> Tensor:
    return torch.randint(50, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_documents_of_a_row_do_not_see_each_other(mixer: str) -> None:
    made, row = model(mixer), ids(40, 1)
    positions = torch.cat([torch.arange(n) for n in (13, 3, 24)])[None]
    packed = logits(made, row, position_ids=positions, use_cache=False)
    apart = [logits(made, part, use_cache=False) for part in row.split([13, 3, 24], 1)]
    if mixer in TOKEN_BY_TOKEN:  # their chunks are those of the row: compare with a row whose other documents differ
        other = row.clone()
        other[:, 13:16] = (other[:, 13:16] + 1) % 50
        changed = logits(made, other, position_ids=positions, use_cache=False)
        assert torch.equal(packed[:, 16:], changed[:, 16:])
        assert torch.equal(packed[:, :13], apart[0])
        assert not torch.allclose(packed[:, 13:16], changed[:, 13:16])
    else:
        torch.testing.assert_close(packed, torch.cat(apart, 1))
    assert not torch.allclose(packed[:, 16:], logits(made, row, use_cache=False)[:, 16:])


@pytest.mark.parametrize("layers", [":", "0::2"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_pieces_through_a_cache_are_read_as_one(mixer: str, layers: str) -> None:
    made, row = model(mixer, layers), ids(37)
    whole, cache, found = logits(made, row, use_cache=False), None, []
    with torch.no_grad():
        for piece in row.split([5, 1, 1, 14, 3, 13], 1):
            name = "cache" if "cache" in made.forward.__code__.co_varnames else "past_key_values"
            out = made(piece, use_cache=True, **({name: cache} if cache is not None else {}))
            cache = getattr(out, name)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_token_changes_nothing_before_it_and_something_far_behind_the_window(mixer: str) -> None:
    made, row = model(mixer, "0::2"), ids(60)
    other = row.clone()
    other[:, 20] = (other[:, 20] + 1) % 50
    before, after = logits(made, row, use_cache=False), logits(made, other, use_cache=False)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 45:], after[:, 45:])


@pytest.mark.parametrize("mixer", TOKEN_BY_TOKEN)
def test_chunks_equal_token_by_token_with_all_gradients(mixer: str) -> None:
    """A row of documents of 13, 3 and 8 tokens; gradients by autograd through autograd's."""
    torch.manual_seed(0)
    layer = MIXERS[mixer](model(mixer).config, 0, **OPTIONS[mixer]).double()
    H, K, T = layer.heads, layer.K, 24
    for x in layer.parameters():
        x.data += 0.1 * torch.randn_like(x)
    q, k, v = (torch.randn(1, H, T, K, dtype=torch.double).requires_grad_() for _ in range(3))
    shape = (3, 1, H, T, 1) if mixer == "lact" else (1, H, T, 1)
    eta = torch.rand(shape, dtype=torch.double).requires_grad_()
    new = torch.zeros(1, T, dtype=torch.bool)
    new[0, [0, 13, 16]] = True
    found = layer.learn(q, k, v, eta, new, {})[0]
    expected = TOKEN_BY_TOKEN[mixer](layer, q, k, v, eta if mixer == "lact" else eta[..., 0], new)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    given = [
        q,
        k,
        v,
        eta,
        *(x for name, x in layer.named_parameters() if name in ("W", "b", "scale", "shift", "W1", "W2", "W3")),
    ]
    gradients = [torch.autograd.grad((x * weights).sum(), given, retain_graph=True) for x in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 1e-3
