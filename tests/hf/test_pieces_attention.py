"""The attention for pieces of a text: transformers' sdpa in every case, without a mask where there need be none."""

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.hf import block_attention
from inplace_ttt.hf.cache import cache_name, cache_of

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
IDS = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))


def reader(kind, attention):
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"] * 2
    if kind == "gemma3":
        model = Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=12, layer_types=layers))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = model.double().eval()
    model.set_attn_implementation(attention)
    return ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=8, update_size=0.1))


@torch.no_grad()
def read(model, sizes, mask=None):
    cache, found, at = DynamicCache(config=model.config), [], 0
    for n in sizes:
        given = {} if mask is None else {"attention_mask": mask[:, : at + n]}
        out = model(IDS[:, at : at + n], use_cache=True, **given, **{cache_name(model): cache})
        cache, at = cache_of(out), at + n
        found.append(out.logits)
    return torch.cat(found, 1), [fast.dense() for fast in ittt.fast_weights(cache).values()]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_sdpa(kind, padded):
    mask = torch.ones_like(IDS)
    if padded:
        mask[1, :11] = 0
    for sizes in ([60], [7, 1, 30, 22], [20, *[1] * 14, 26]):
        ours, theirs = (read(reader(kind, name), sizes, mask) for name in (block_attention.PIECES, "sdpa"))
        real = mask.bool()
        torch.testing.assert_close(ours[0][real], theirs[0][real], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-9, rtol=1e-9)


def test_pieces_need_no_mask(monkeypatch):
    seen = []

    def spy(n, T):
        seen.append((n, T))
        return original(n, T)

    original = block_attention.causal_lower_right
    monkeypatch.setattr(block_attention, "causal_lower_right", spy)
    read(reader("llama", block_attention.PIECES), [60])
    assert set(seen) == {(min(8, 60 - at), at + min(8, 60 - at)) for at in range(8, 60, 8)}


def test_capped_scores_are_refused():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="capped"):
        block_attention.pieces_attention(torch.nn.Module(), x[:, :, :2], x, x, None, softcap=1.0)
