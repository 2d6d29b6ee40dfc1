"""Rows merged into one cache and taken out again, and caches written down: every row reads as it does alone."""

import copy
import json

import pytest
import torch
from contract.families import C, adapted, plain, tokens
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import install
from inplace_ttt.hf.rows import from_tensors, merge, split, to_tensors
from inplace_ttt.hf.window import clear, evict, sliding_windows

W = 6
LENGTHS = (2, W - 1, W, W + 1, 3 * C + 3, 0)
STEPS = 10
FAMILIES = ("llama", "mistral", "gemma3_text", "exaone4", "gpt2", "qwen3", "glm")
TOLERANCE = {"atol": 1e-9, "rtol": 0.0}


def read(model, cache, ids, positions, **keywords):
    with torch.no_grad():
        return model(ids, past_key_values=cache, position_ids=positions, **keywords).logits


def filled(model, length, seed=0):
    cache = DynamicCache(config=model.config)
    if length:
        read(model, cache, tokens(1, length, seed), torch.arange(length)[None])
    return cache


def alone(model, cache, ids, position):
    """Logits of ids [T] read one by one."""
    out = [read(model, cache, t.view(1, 1), torch.tensor([[position + n]]))[0] for n, t in enumerate(ids)]
    return torch.cat(out)


def at_once(model, cache, ids, position):
    """Logits of ids [T] read in one call."""
    return read(model, cache, ids[None], position + torch.arange(len(ids))[None])[0]


def together(model, cache, mask, ids, positions, size=1):
    """Logits [B, T, V] of ids [B, T] read ``size`` at a time, row b from ``positions[b]`` on; and the mask then."""
    out = []
    for n in range(0, ids.shape[1], size):
        piece = ids[:, n : n + size]
        mask = torch.cat([mask, torch.ones_like(piece)], 1)
        at = torch.tensor(positions)[:, None] + n + torch.arange(piece.shape[1])
        out.append(read(model, cache, piece, at, attention_mask=mask))
    return torch.cat(out, 1), mask


def check(model, caches, positions, size=1):
    """Merged reading and reading on after a split equal the rows' own; ``caches`` are left as they were."""
    own = [copy.deepcopy(cache) for cache in caches]
    ids, more = tokens(len(caches), STEPS, seed=7), tokens(len(caches), C + 1, seed=8)
    merged, mask = merge(caches, model.config)
    got, mask = together(model, merged, mask, ids, positions, size)
    for b, cache in enumerate(own):
        assert_close(got[b], at_once(model, cache, ids[b], positions[b]), **TOLERANCE)
    for b, cache in enumerate(own):
        row = split(merged, mask if b % 2 else mask.sum(1).tolist(), b)
        assert [layer.get_seq_length() for layer in row.layers] == [int(mask[b].sum())] * len(row.layers)
        want = at_once(model, cache, more[b], positions[b] + STEPS)
        assert_close(alone(model, row, more[b], positions[b] + STEPS), want, **TOLERANCE)
    return mask


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merged_rows_read_as_alone(model_type):
    model = adapted(model_type)
    check(model, [filled(model, n, seed) for seed, n in enumerate(LENGTHS)], LENGTHS)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt2"])
def test_without_fast_weights(model_type):
    model = plain(model_type)
    check(model, [filled(model, n, seed) for seed, n in enumerate(LENGTHS)], LENGTHS)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("lengths", [(3,), (2, 4, 1), (W - 1, W - 1), (W, 2), (0, 0), (3 * W, 2 * W)])
def test_several_tokens_at_a_time_and_other_lengths(model_type, lengths):
    model = adapted(model_type)
    check(model, [filled(model, n, seed) for seed, n in enumerate(lengths)], lengths, size=3)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "exaone4"])
def test_rows_that_have_evicted(model_type):
    """Fewer keys in the full layers than tokens read by the sliding ones, in some rows."""
    model = adapted(model_type)
    lengths = (4 * W, 3 * W, W + 2, 2)
    caches = [filled(model, n, seed) for seed, n in enumerate(lengths)]
    evict(caches[0], 2, 3 * W)
    evict(caches[1], 1, 2)
    evict(caches[2], 0, 3)  # as many as the sliding layers hold
    mask = check(model, caches, lengths)
    assert mask.sum(1).tolist() == [W + STEPS, 3 * W - 2 + STEPS, W - 1 + STEPS, 2 + STEPS]


def test_rows_that_have_been_cleared():
    model = adapted("gemma3_text")
    caches = [filled(model, n, seed) for seed, n in enumerate((9, 7, 5))]
    clear(caches[0])
    clear(caches[2])
    check(model, caches, (0, 7, 0))
    for cache in caches:
        clear(cache)
    check(model, caches, (0, 0, 0))


def test_rows_that_keep_more_than_their_window_for_a_rollback():
    model, positions = plain("mistral"), torch.arange(3 * W)[None]
    recording = DynamicCache(config=model.config)
    recording.activate_past_recording()
    read(model, recording, tokens(1, 3 * W), positions)
    assert recording.layers[0].keys.shape[2] == 3 * W
    caches = [recording, filled(model, 2)]
    ids = tokens(2, STEPS, seed=7)
    got, _ = together(model, *merge(caches, model.config), ids, (3 * W, 2))
    assert_close(got[0], alone(model, filled(model, 3 * W), ids[0], 3 * W), **TOLERANCE)
    assert_close(got[1], alone(model, caches[1], ids[1], 2), **TOLERANCE)


def test_sliding_layers_that_hold_more_than_full_ones_cannot_share_a_mask():
    model = adapted("gemma3_text")
    caches = [filled(model, 9), filled(model, 9)]
    evict(caches[0], 0, 9 - (W - 1) + 1)
    with pytest.raises(ValueError, match=rf"holds {W - 1} tokens, its full-attention layers {W - 2}.*last {W - 1}"):
        merge(caches, model.config)


def test_the_mask_and_what_is_copied():
    model = adapted("llama")
    caches = [filled(model, n) for n in (3, 1, 0)]
    merged, mask = merge(caches, model.config)
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert mask.dtype == torch.int64
    keys = [caches[0].layers[0].keys.clone(), caches[0].layers[0].fast.z.clone()]
    ids = tokens(3, 2, seed=3)
    got, _ = together(model, merged, mask, ids, (3, 1, 0))
    assert torch.equal(caches[0].layers[0].keys, keys[0])
    assert torch.equal(caches[0].layers[0].fast.z, keys[1])
    all_real, _ = together(model, merge(caches, model.config)[0], torch.ones_like(mask), ids, (3, 1, 0))
    assert float((all_real - got)[1:].abs().max()) > 1e-2  # the zeros of the padding do count if they are not masked
    mixed, _ = merge([filled(plain("mistral"), n) for n in (2, 3 * W)], plain("mistral").config)
    assert {layer.keys.shape[2] for layer in mixed.layers} == {W - 1}
    assert {layer.get_seq_length() for layer in mixed.layers} == {W - 1}


def test_a_split_row_holds_only_its_own_memory():
    model = adapted("gemma3_text")
    merged, mask = merge([filled(model, n) for n in (4, 17)], model.config)
    row = split(merged, mask, 0)
    for layer, window in zip(row.layers, sliding_windows(model), strict=True):
        assert layer.keys.shape[2] == (4 if window is None else min(4, window - 1))
        for x in (layer.keys, layer.values):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    before = merged.layers[0].fast.z.clone()
    alone(model, row, tokens(1, 2)[0], 4)
    assert torch.equal(merged.layers[0].fast.z, before)
    assert merged.layers[0].fast.rows == 2
    for lengths in ([18, 17], [5, 18]):
        with pytest.raises(ValueError, match=r"should have 18 tokens, but the cache holds 17"):
            split(merged, lengths, lengths.index(18))


def test_where_all_layers_slide_a_row_may_keep_its_own_count():
    model = adapted("mistral")
    cache = filled(model, 3 * W)
    merged, mask = merge([cache, filled(model, 2)], model.config)
    row = split(merged, [3 * W, 2], 0)
    assert row.get_seq_length() == 3 * W
    ids = tokens(1, 5, seed=2)[0]
    assert_close(alone(model, row, ids, 3 * W), alone(model, cache, ids, 3 * W), **TOLERANCE)
    assert split(merged, mask, 0).get_seq_length() == W - 1


def test_the_clip_goes_along():
    model = adapted("llama", clip=0.5)
    caches = [filled(model, n) for n in (0, 3, 9)]
    merged, mask = merge(caches, model.config)
    for cache in (merged, split(merged, mask, 2)):
        assert all(fast.rule.clip == 0.5 for fast in ittt.fast_weights(cache).values())
    check(model, caches, (0, 3, 9))


def test_rows_read_with_updates_off():
    model = adapted("llama")
    with ittt.updates_off(model):
        caches = [filled(model, n) for n in (3, 9)]
        check(model, caches, (3, 9))
    stale = [filled(model, n) for n in (3, 9)]
    with ittt.updates_off(model):
        for cache in stale:
            read(model, cache, tokens(1, 1), torch.tensor([[9]]))
    merged, mask = merge(stale, model.config)
    for cache in (merged, split(merged, mask, 1)):
        assert all(cache.layers[i].stale for i in ittt.fast_weights(cache))
    with pytest.raises(ValueError, match="updates off"):
        merge([stale[0], filled(model, 4)], model.config)
    with pytest.raises(ValueError, match="with fast weights and another without"):
        merge([filled(model, 4), caches[0]], model.config)


def test_what_cannot_be_merged():
    model, other = adapted("gemma3_text"), adapted("mistral")
    cache = filled(model, 4)
    two = DynamicCache(config=model.config)
    read(model, two, tokens(2, 4), torch.arange(4).expand(2, -1))
    for caches, reason in (
        ([], "no caches"),
        ([cache, two], "one row"),
        ([cache, filled(other, 4)], "not of this model"),
    ):
        with pytest.raises(ValueError, match=reason):
            merge(caches, model.config)
    uneven = plain("llama")
    caches = [filled(uneven, 4), filled(uneven, 5)]
    caches[1].layers[2] = caches[0].layers[2]
    with pytest.raises(ValueError, match="different numbers of tokens"):
        merge(caches, uneven.config)
    with pytest.raises(NotImplementedError, match="static"):
        merge([StaticCache(config=uneven.config, max_cache_len=9)], uneven.config)
    made_by_calls = DynamicCache()
    read(uneven, made_by_calls, tokens(1, 5), torch.arange(5)[None])
    check(uneven, [made_by_calls, DynamicCache(), caches[0]], (5, 0, 4))


@pytest.mark.parametrize("length", [0, 3, 17])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_a_cache_written_down_reads_on(model_type, length, tmp_path):
    model = adapted(model_type)
    cache = filled(model, length)
    if length > W and model_type != "mistral":
        evict(cache, 1, 4)
    tensors, info = to_tensors(cache)
    save_file(tensors, tmp_path / "cache.safetensors")
    (tmp_path / "cache.json").write_text(json.dumps(info))
    fast = {i: state.fork() for i, state in ittt.fast_weights(cache).items()}
    ids = tokens(1, C + 2, seed=5)[0]
    want = alone(model, cache, ids, length)
    again = from_tensors(
        load_file(tmp_path / "cache.safetensors"), json.loads((tmp_path / "cache.json").read_text()), model.config
    )
    assert ittt.fast_weights(again) == {}
    for i, state in fast.items():
        install(again, i, state)
    assert_close(alone(model, again, ids, length), want, **TOLERANCE)
    assert [layer.get_seq_length() for layer in again.layers] == [layer.get_seq_length() for layer in cache.layers]


def test_a_cache_of_another_model_is_refused():
    tensors, info = to_tensors(filled(plain("mistral"), 4))
    for other in ("llama", "gemma3_text"):
        with pytest.raises(ValueError, match="another model"):
            from_tensors(tensors, info, plain(other).config)
    tensors, info = to_tensors(DynamicCache())
    assert from_tensors(tensors, info, plain("llama").config).get_seq_length() == 0
