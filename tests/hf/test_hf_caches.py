"""The fast weights inside a cache: given, made, copied, stored, reset, and refused with a reason."""

import copy
import io

import pytest
import torch
from contract.families import BUILDERS, RECURRENT, C, adapted, logits, plain, randomise, tokens, tolerance
from torch.testing import assert_close
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache, StaticCache, StaticLayer

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import FastCacheLayer, cache_name

TOLERANCE = {"atol": 1e-6, "rtol": 0.0}
IDS = tokens(2, 2 * C + 2)
MORE = tokens(2, C + 1, seed=1)


def read(model, cache, ids=IDS, **keywords):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **keywords).logits


def continuation(model, before=IDS, after=MORE):
    """Logits of ``after`` when it follows ``before``, without a cache."""
    return logits(model, torch.cat([before, after], 1))[:, before.shape[1] :]


@pytest.mark.parametrize("model_type", sorted(BUILDERS))
def test_a_cache_counts_whatever_use_cache_says(model_type):
    """transformers reads and fills a cache that is passed even with ``use_cache=False``, so must the fast weights."""
    model = adapted(model_type)
    cache = DynamicCache(config=model.config) if model_type in RECURRENT else DynamicCache()
    read(model, cache, use_cache=False)
    assert_close(read(model, cache, MORE, use_cache=False), continuation(model), **tolerance(model_type))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_the_cache_a_call_makes_by_itself(model_type):
    model = adapted(model_type)
    with torch.no_grad():
        cache = model(IDS).past_key_values
        assert_close(read(model, cache, MORE), continuation(model), **TOLERANCE)
        out = model.base_model(IDS)
    assert isinstance(out.past_key_values, Cache)
    assert set(ittt.fast_weights(out.past_key_values)) == {0, 2}


def test_positional_arguments_of_the_base_model():
    model, cache = adapted("llama"), DynamicCache()
    with torch.no_grad():
        model.model(IDS, None, None, cache)
        got = model.lm_head(model.model(MORE, None, None, cache).last_hidden_state)
        assert_close(got, continuation(model), **TOLERANCE)
        with pytest.raises(ValueError, match=r"pass (past_key_values|cache) by keyword"):
            model.model(IDS, None, None, None)


def test_inference_mode_and_back():
    model, cache = adapted("llama"), DynamicCache()
    with torch.inference_mode():
        model(IDS[:, :-1], past_key_values=cache)
    want = continuation(model, IDS[:, :-1], torch.cat([IDS[:, -1:], MORE], 1))
    got = [read(model, cache, IDS[:, -1:]), read(model, cache, MORE)]  # the first only adds to the pending tokens
    assert_close(torch.cat(got, 1), want, **TOLERANCE)


def test_gradients_through_a_cache():
    """In eval mode a cache carries the graph along: calls of any size give the gradient of one."""
    model, ids, cache = adapted("llama"), torch.cat([IDS, MORE], 1), DynamicCache()
    parameters, g = list(model.parameters()), torch.randn(*ids.shape, 97, dtype=torch.float64)
    sizes = (C - 1, 1, 1, 1, C, *(1,) * (ids.shape[1] - 2 * C - 2))
    pieces = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)
    got = torch.autograd.grad((pieces * g).sum(), parameters)
    joined = model(ids, use_cache=False).logits
    for a, b in zip(got, torch.autograd.grad((joined * g).sum(), parameters), strict=True):
        assert_close(a, b, atol=1e-6 * max(float(b.abs().max()), 1.0), rtol=0)


@pytest.mark.parametrize("form", ["dense", "auto", 2])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_cache_is_cut_off_its_graph(model_type, form):
    """Truncated backpropagation: each piece's gradients are those behind a text that was read without a graph."""
    model, ids = adapted(model_type), torch.cat([IDS, MORE], 1)
    parameters = list(model.parameters())
    cut, whole = C + 2, DynamicCache(config=model.config)
    keywords = {cache_name(model): whole}

    def gradients(part, **keywords):
        """Of the loss of ``part``, whose graph is freed then."""
        logits = model(part, **keywords).logits
        found = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    with runtime_of(model).reading(runtime_of(model).config, form):
        gradients(ids[:, :cut], **keywords)
        assert ittt.detach_cache(whole) is whole
        second = gradients(ids[:, cut : 3 * C], **keywords)
        third = gradients(ids[:, 3 * C :], **{cache_name(model): ittt.detach_cache(whole)})
        for found, begin, end in ((second, cut, 3 * C), (third, 3 * C, ids.shape[1])):
            before = DynamicCache(config=model.config)
            with torch.no_grad():
                for start, stop in ((0, cut), (cut, 3 * C))[: 1 if begin == cut else 2]:
                    model(ids[:, start:stop], **{cache_name(model): before})
            want = gradients(ids[:, begin:end], **{cache_name(model): before})
            for a, b in zip(found, want, strict=True):
                assert_close(a, b, atol=1e-6 * max(float(b.abs().max()), 1.0), rtol=0)


def test_what_is_not_cut_off_goes_on():
    """Without it the same pieces have other gradients, and none once the first graph was freed."""
    model, cache = adapted("llama"), DynamicCache()
    model(IDS, **{cache_name(model): cache}).logits.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        model(MORE, **{cache_name(model): cache}).logits.sum().backward()


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=32)])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_copies_are_independent(model_type, make, how):
    model = adapted(model_type)
    cache = make(config=model.config)
    read(model, cache)
    if how == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    want, back = continuation(model), continuation(model, after=MORE.flip(1))
    for t in range(C + 1):  # within a chunk, then beyond
        assert_close(read(model, cache, MORE[:, t : t + 1]), want[:, t : t + 1], **TOLERANCE)
        assert_close(read(model, other, MORE.flip(1)[:, t : t + 1]), back[:, t : t + 1], **TOLERANCE)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config, max_cache_len=32)])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_reset_begins_a_document(model_type, make):
    model = adapted(model_type)
    cache = make(config=model.config)
    read(model, cache)
    cache.reset()
    fast = ittt.fast_weights(cache)
    assert all(state.S is None and state.seen == (0, 0) for state in fast.values())
    if cache.layers[0].keys is None or make is not DynamicCache:  # transformers 5.17 keeps zeroed keys
        assert_close(read(model, cache), logits(model, IDS), **TOLERANCE)


def test_reset_then_another_number_of_rows():
    model, cache = adapted("llama"), DynamicCache()
    read(model, cache)
    cache.reset()
    if cache.layers[0].keys is not None:
        pytest.skip("this transformers keeps the keys of a cache that was reset")
    ids = tokens(3, C + 2)
    assert_close(read(model, cache, ids), logits(model, ids), **TOLERANCE)


def test_another_number_of_rows_in_the_middle_is_refused():
    model, cache = adapted("llama"), DynamicCache()
    read(model, cache)
    with pytest.raises(ValueError, match="the state holds 2 rows, the call has 3"):
        read(model, cache, tokens(3, 2))


def test_crop_back_to_nothing_and_small_chunks():
    """128 tokens can be taken back whatever the chunk size; a rollback goes through many chunks."""
    model, ids = adapted("llama", chunk_size=2, lr=0.002), tokens(1, 140)
    cache = DynamicCache()
    read(model, cache, ids)
    cache.crop(-128)
    assert_close(read(model, cache, MORE[:1]), continuation(model, ids[:, :12], MORE[:1]), **TOLERANCE)
    cache.crop(0)
    cache.crop(-3)
    assert_close(
        read(model, cache, IDS[:1]),
        continuation(model, torch.cat([ids[:, :12], MORE[:1, :2]], 1), IDS[:1]),
        **TOLERANCE,
    )


def test_crop_skips_the_padding_inside():
    """Rows lose as many of their own tokens as lie in the dropped positions."""
    model, cache, mask = adapted("llama"), DynamicCache(), torch.ones_like(IDS)
    mask[0, -5:-1], mask[1, 1], mask[1, -2:] = 0, 0, 0
    read(model, cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache.crop(-4)
    kept, positions = torch.cat([mask[:, :-4], torch.ones_like(MORE)], 1), mask[:, :-4].sum(1)[:, None]
    got = read(model, cache, MORE, attention_mask=kept, position_ids=positions + torch.arange(C + 1))
    for b in range(2):
        before = IDS[b : b + 1, :-4][:, mask[b, :-4] > 0]
        assert_close(got[b : b + 1], continuation(model, before, MORE[b : b + 1]), **TOLERANCE)


def test_crop_too_far_is_refused_and_changes_nothing():
    model, ids = adapted("llama", chunk_size=2, lr=0.002), tokens(1, 140)
    cache = DynamicCache()
    read(model, cache, ids)
    with pytest.raises(ValueError, match="cannot take back 135 tokens of row 0: its fast weights can go back 128"):
        cache.crop(-135)
    assert cache.get_seq_length() == 140
    assert_close(read(model, cache, MORE[:1]), continuation(model, ids, MORE[:1]), **TOLERANCE)


def test_a_crop_that_the_keys_refuse_leaves_the_fast_weights():
    """A sliding window that recorded no past cannot be cropped."""
    model = adapted("mistral")
    cache = DynamicCache(config=model.config)
    read(model, cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-C)
    assert_close(read(model, cache, MORE), continuation(model), **TOLERANCE)


@pytest.mark.parametrize("drop", [1, 5])
def test_crop_of_a_static_cache(drop):
    """From transformers 5.24 on static layers can be cropped: what follows is read as if the rest had never been."""
    model = adapted("llama")
    cache = StaticCache(config=model.config, max_cache_len=64)
    read(model, cache)
    if hasattr(StaticLayer, "crop"):
        cache.crop(-drop)
        want = continuation(model, IDS[:, :-drop], MORE)
        assert_close(read(model, cache, MORE), want, **TOLERANCE)
    else:
        with pytest.raises(NotImplementedError, match="StaticLayer has no crop: use a DynamicCache"):
            cache.layers[0].crop(-drop)
    with pytest.raises(NotImplementedError, match="StaticLayer has no batch_select_indices"):
        cache.layers[0].batch_select_indices(torch.tensor([0]))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"decay": 0.2},
        {"clip": 1.0},
        {"clip": 0.5, "clip_relative": True, "decay": 0.1},
        {"objective": "next_token"},
        {"objective": "reconstruction", "projection": False, "lr": 0.01},
        {"projection": False, "conv_kernel": 3, "lookahead": 0},
        {"conv_kernel": 1, "lookahead": 0, "chunk_size": 1, "lr": 0.01},
        {"conv_kernel": 7, "lookahead": 4},
    ],
)
def test_every_setting_in_pieces_and_taken_back(model_type, settings):
    model, ids = adapted(model_type, **settings), torch.cat([IDS, MORE], 1)
    with ittt.updates_off(model):
        slow = logits(model, ids)
    want = logits(model, ids)
    assert float((want - slow).abs().max()) > 1e-2
    cache = DynamicCache()
    got = [read(model, cache, part) for part in IDS.split((C - 1, 2, C + 1), 1)]
    assert_close(torch.cat(got, 1), want[:, : IDS.shape[1]], **TOLERANCE)
    read(model, cache, tokens(2, 2 * C, seed=2))
    cache.crop(-2 * C - 3)
    assert_close(read(model, cache, ids[:, IDS.shape[1] - 3 :]), want[:, IDS.shape[1] - 3 :], **TOLERANCE)


def test_boolean_selection_of_rows():
    model, cache = adapted("llama"), DynamicCache()
    read(model, cache)
    cache.batch_select_indices(torch.tensor([False, True]))
    assert_close(read(model, cache, MORE[1:]), continuation(model)[1:], **TOLERANCE)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_cache_filled_before_attach():
    model, cache = plain("llama"), DynamicCache()
    read(model, cache)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C))
    with pytest.raises(ValueError, match=r"filled without fast weights.*start from an empty cache"):
        read(model, cache, MORE)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])
def test_a_cache_filled_with_updates_off(model_type):
    model = adapted(model_type)
    cache = DynamicCache(config=model.config)
    with ittt.updates_off(model):
        want = read(model, cache)
        read(model, cache, MORE)
    assert_close(want, logits(ittt.detach(adapted(model_type)), IDS), **TOLERANCE)
    with pytest.raises(ValueError, match="filled without fast weights"):
        read(model, cache, MORE)


def test_a_cache_continued_with_updates_off():
    model, cache = adapted("llama"), DynamicCache()
    read(model, cache)
    with ittt.updates_off(model):
        read(model, cache, MORE)
    with pytest.raises(ValueError, match="read tokens with updates off"):
        read(model, cache, MORE)
    cache.reset()
    assert not any(layer.stale for layer in cache.layers if isinstance(layer, FastCacheLayer))


def test_the_cache_of_a_training_forward():
    """transformers makes one by default; keeping a graph in it would keep every activation."""
    model = adapted("llama").train()
    cache = model(IDS).past_key_values
    assert not ittt.fast_weights(cache)
    with pytest.raises(ValueError, match="in a training forward"):
        read(model.eval(), cache, MORE)


def test_tuples_are_no_cache():
    model = adapted("llama")
    with pytest.raises(NotImplementedError, match="fast weights in a tuple: pass a DynamicCache"):
        read(model, tuple((torch.zeros(2, 2, 3, 8),) * 2 for _ in range(3)))


@pytest.mark.parametrize("name", [n for n in dir(cache_utils) if n.endswith("QuantizedLayer")])
def test_quantised_caches(name):
    """Built by hand: their own constructors need packages that are not installed."""
    model, methods = adapted("llama"), {"_quantize": None, "_dequantize": None}
    cls = type(name, (getattr(cache_utils, name),), methods)
    layers = [cls.__new__(cls) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=f"a cache of {name} cannot carry fast weights: use a DynamicCache"):
        read(model, Cache(layers=layers))


def test_a_cache_with_too_few_layers():
    model = adapted("llama")
    with pytest.raises(ValueError, match="the cache has 1 layers, the model needs one for layer 2"):
        read(model, Cache(layers=[cache_utils.DynamicLayer()]))


def test_the_same_cache_in_another_model():
    """Chunks of another size cannot continue: refused rather than mixed."""
    first, second, cache = adapted("llama"), adapted("llama", chunk_size=2 * C), DynamicCache()
    read(first, cache)
    with pytest.raises(ValueError, match=r"chunks of 4 tokens.*chunks of 8"):
        read(second, cache, MORE)
    third = adapted("llama", layers=(0,))
    randomise(third)
    with pytest.raises(ValueError, match=r"layer 2.*does not adapt"):
        read(third, cache, MORE)
