"""Evicting from full-attention layers, clearing a context, and counting its bytes."""

import pytest
import torch
from contract.families import BUILDERS, C, adapted, plain, tokens
from torch.testing import assert_close
from transformers import LlamaConfig, cache_utils
from transformers.cache_utils import Cache, DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import install
from inplace_ttt.hf.window import (
    cache_bytes,
    clear,
    empty_cache,
    evict,
    has_full_attention,
    native_window,
    plain_layers,
    sliding_windows,
)

W = 6
N = 3 * C + 3
IDS, MORE = tokens(2, N), tokens(2, C + 2, seed=1)
TOLERANCE = {"atol": 1e-9, "rtol": 0.0}


def read(model, cache, ids, position=0, **keywords):
    positions = torch.arange(position, position + ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return model(ids, past_key_values=cache, position_ids=positions, **keywords).logits


def filled(model, ids=IDS):
    cache = DynamicCache(config=model.config)
    read(model, cache, ids[:, :5])
    read(model, cache, ids[:, 5:], 5)
    return cache


@pytest.mark.parametrize(
    ("model_type", "windows"),
    [
        ("llama", [None, None, None]),
        ("gpt2", [None, None, None]),
        ("mistral", [W, W, W]),
        ("gemma3_text", [W, None, W]),
    ],
)
def test_which_layers_slide(model_type, windows):
    model = adapted(model_type)
    assert sliding_windows(model) == windows
    assert native_window(model) == (None if None in windows else W)
    assert has_full_attention(model) is (None in windows)
    assert has_full_attention(filled(model)) is (None in windows)


def test_windows_of_different_size_and_a_cache_without_layers_yet():
    cache = empty_cache(plain("mistral").config)
    cache.layers[1].sliding_window = 2 * W
    assert sliding_windows(cache) == [W, 2 * W, W]
    assert native_window(cache) == 2 * W
    assert has_full_attention(DynamicCache()) is True
    assert native_window(DynamicCache()) is None


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_evict_drops_these_tokens_and_frees_their_memory(model_type):
    model = adapted(model_type)
    cache = filled(model)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    evict(cache, 2, 4)
    for layer, (keys, values), window in zip(cache.layers, before, sliding_windows(model), strict=True):
        if window is not None:
            assert layer.keys is keys
            assert layer.values is values
            continue
        kept = [0, 1, *range(6, N)]
        for now, x in ((layer.keys, keys), (layer.values, values)):
            assert torch.equal(now, x[:, :, kept])
            assert now.untyped_storage().nbytes() == now.numel() * now.element_size()
        assert layer.get_seq_length() == N - 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "exaone4", "qwen3"])
def test_what_is_evicted_is_not_attended_to(model_type):
    """The reference keeps all keys and masks the dropped ones; sliding layers see neither."""
    model = adapted(model_type)
    want, got, plainly = filled(model), filled(model), filled(model)
    evict(got, 2, 5)
    evict(plainly, 2, 5)
    mask = torch.ones(2, N, dtype=torch.int64)
    mask[:, 2:7] = 0
    for at, piece in ((0, MORE[:, :1]), (1, MORE[:, 1:2]), (2, MORE[:, 2:])):
        n = piece.shape[1]
        mask = torch.cat([mask, mask.new_ones(2, n)], 1)
        a = read(model, want, piece, N + at, attention_mask=mask)
        assert_close(read(model, got, piece, N + at), a, **TOLERANCE)
        own = torch.ones(2, N - 5 + at + n, dtype=torch.int64)  # one column for each token still there
        assert_close(read(model, plainly, piece, N + at, attention_mask=own), a, **TOLERANCE)
        assert at or float((read(model, filled(model), piece, N) - a).abs().max()) > 1e-2


def test_evict_all_and_go_on():
    model = adapted("llama")
    cache = filled(model)
    evict(cache, 0, N)
    assert cache.get_seq_length() == 0
    emptied = filled(model)
    clear(emptied)
    assert_close(read(model, cache, MORE), read(model, emptied, MORE), **TOLERANCE)


def test_a_sliding_layer_that_forgot_tokens_still_knows():
    model = plain("gemma3_text")
    cache = filled(model)
    evict(cache, 0, N - 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [W, 2, W]
    with pytest.raises(RuntimeError, match="crop"):
        cache.crop(-1)


def test_evict_refuses_what_is_not_there():
    model = plain("gemma3_text")
    cache = filled(model)
    for first, drop in ((N - 3, 4), (0, N + 1), (-1, 2), (2, -1)):
        with pytest.raises(ValueError, match=r"cannot drop|negative"):
            evict(cache, first, drop)
    assert [layer.get_seq_length() for layer in cache.layers] == [N] * 3
    keys = [layer.keys for layer in cache.layers]
    evict(cache, 3, 0)
    evict(DynamicCache(config=model.config), 0, 0)
    assert all(layer.keys is k for layer, k in zip(cache.layers, keys, strict=True))


class _QuantizedLayer(cache_utils.DynamicLayer):
    pass


def _refused():
    config = BUILDERS["llama"]()
    yield StaticCache(config=config, max_cache_len=8), "fixed length"
    yield Cache(layers=[cache_utils.LinearAttentionLayer()]), "no single tokens"
    yield Cache(layers=[cache_utils.DynamicIndexedLayer()]), "second index"
    yield Cache(layers=[_QuantizedLayer()]), "quantised"
    yield cache_utils.EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"
    offloaded = DynamicCache()
    offloaded.offloading = True
    yield offloaded, "offloading"


@pytest.mark.parametrize(("cache", "reason"), list(_refused()))
def test_other_kinds_of_cache_are_refused(cache, reason):
    for edit in (plain_layers, clear, cache_bytes, has_full_attention, lambda c: evict(c, 0, 0)):
        with pytest.raises(NotImplementedError, match=reason):
            edit(cache)


def test_attention_within_chunks_of_the_text_is_refused():
    config = LlamaConfig(num_hidden_layers=2, attention_chunk_size=8)
    config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(NotImplementedError, match="chunks"):
        empty_cache(config)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_clear_keeps_the_fast_weights(model_type):
    """The reference is an empty cache to which the fast weights of the document are given."""
    model = adapted(model_type)
    cache, other = filled(model), DynamicCache(config=model.config)
    for i, fast in ittt.fast_weights(cache).items():
        install(other, i, fast.fork())
    states = {i: fast.S for i, fast in ittt.fast_weights(cache).items()}
    clear(cache)
    assert cache_bytes(cache) == 0
    for i, layer in enumerate(cache.layers):
        assert layer.get_seq_length() == 0
        if i in states:
            assert layer.fast.S is states[i]
            assert layer.fast.seen == (N, N)
    got = read(model, cache, MORE)
    assert_close(got, read(model, other, MORE), **TOLERANCE)
    assert float((got - read(model, DynamicCache(config=model.config), MORE)).abs().max()) > 1e-2


@pytest.mark.parametrize("model_type", ["llama", "glm", "qwen3"])
def test_after_clear_attention_sees_nothing_before(model_type):
    """The reference is one call with a mask that hides the document from the question."""
    model = adapted(model_type)
    cache = filled(model)
    clear(cache)
    got = torch.cat([read(model, cache, MORE[:, :1]), read(model, cache, MORE[:, 1:], 1)], 1)
    total = N + MORE.shape[1]
    allowed = torch.ones(total, total).tril().bool()
    allowed[N:, :N] = False
    mask = torch.zeros(total, total, dtype=torch.float64).masked_fill(~allowed, -1e300).expand(2, 1, -1, -1)
    with torch.no_grad():
        both = torch.cat([IDS, MORE], 1)
        one = torch.zeros_like(both)  # one document for the fast weights, whatever attention sees
        want = model(both, attention_mask=mask, seq_idx=one, use_cache=False).logits[:, N:]
        whole = model(both, use_cache=False).logits[:, N:]
    assert_close(got, want, atol=1e-5, rtol=0)  # rotary phases are rounded to float32
    assert float((want - whole).abs().max()) > 1e-2


def test_bytes_are_those_of_whole_storages_each_once():
    model = plain("gemma3_text")
    cache, token = DynamicCache(config=model.config), 2 * 2 * 8 * 8  # rows, heads, head size, float64
    read(model, cache, IDS)
    assert cache_bytes(cache) == 3 * 2 * N * token  # the sliding layers' keys are views of all
    read(model, cache, MORE[:, :1], N)
    assert cache_bytes(cache) == 2 * (N + 1 + 2 * W) * token
    evict(cache, 0, 4)
    assert cache_bytes(cache) == 2 * (N - 3 + 2 * W) * token
    layer = cache.layers[1]
    layer.values = layer.keys[:, :, 1:]
    assert cache_bytes(cache) == (N - 3 + 2 * 2 * W) * token
