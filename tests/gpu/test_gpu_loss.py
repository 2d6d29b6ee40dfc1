"""Reading by the loss on a CUDA device: the same numbers as on the CPU, and the attention for pieces."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt.hf.block_attention import PIECES
from inplace_ttt.hf.cache import cache_name, cache_of

pytestmark = pytest.mark.gpu
C, VOCAB = 64, 257
IDS = torch.randint(1, VOCAB, (2, 5 * C + 9), generator=torch.Generator().manual_seed(0))


def plain(dtype):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **shape, num_key_value_heads=2, **ends)).to(dtype).eval()


@torch.no_grad()
def read(model, sizes=(IDS.shape[1],), device="cuda"):
    model, found, cache = model.to(device), [], DynamicCache(config=model.config)
    for part in IDS.to(device).split(list(sizes), 1):
        out = model(part, use_cache=True, **{cache_name(model): cache})
        cache = cache_of(out)
        found.append(out.logits.double().cpu())
    return torch.cat(found, 1)


def reader(dtype, size, attention="sdpa"):
    model = plain(dtype)
    model.set_attn_implementation(attention)
    return ittt.attach(model, ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, update_size=size))


@pytest.mark.parametrize("size", [0.05, "auto"])
def test_float64_equals_the_cpu(size):
    model = reader(torch.float64, size)
    want = read(copy.deepcopy(model), device="cpu")  # norms are taken in float32
    torch.testing.assert_close(read(model), want, atol=1e-5, rtol=0)
    sizes = [C + 5, 1, 1, 2 * C, IDS.shape[1] - 3 * C - 7]
    torch.testing.assert_close(read(model, sizes), want, atol=1e-5, rtol=0)


def test_the_attention_for_pieces_is_as_exact_as_sdpa():
    exact, off = read(reader(torch.float32, 0.05)), read(plain(torch.float32))
    errors = {
        name: (read(reader(torch.bfloat16, 0.05, name)) - exact)[:, C:].norm().item() for name in ("sdpa", PIECES)
    }
    assert errors[PIECES] < 1.3 * errors["sdpa"]
    assert errors[PIECES] < 0.5 * (exact - off)[:, C:].norm().item()
