"""Fast weights held as pairs or at a rank: whatever a cache goes through, a model reads and writes as without one."""

import copy
import io

import pytest
import torch
from contract.families import C, adapted, logits, padded, tokens
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import fast_layers
from inplace_ttt.hf.settings import Settings

NEW = 3 * C
ALL = 10**6
"""A rank that nothing here exceeds. ("auto" is dense from 20 tokens on in these models: D = 32, F = 48.)"""
TOLERANCE = {"atol": 1e-6, "rtol": 0.0}
exact_forms = pytest.mark.parametrize("form", ["auto", ALL])
families = pytest.mark.parametrize("model_type", ["llama", "gpt2"])


def formed(model_type, form, **settings):
    model = adapted(model_type, **settings)
    runtime_of(model).configure(form=form)
    return model


def greedy(model, ids, **keywords):
    keywords.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **keywords)


def states(cache):
    return list(ittt.fast_weights(cache).values())


def read(model, cache, ids, **keywords):
    with torch.no_grad():
        return model(ids, past_key_values=cache, **keywords).logits


@families
@exact_forms
@pytest.mark.parametrize("settings", [{}, {"decay": 0.2, "clip": 1.0}])
def test_generate(model_type, form, settings):
    """Greedy and beams on a padded batch, and drafts longer than a chunk, most of them rejected."""
    model = formed(model_type, form, **settings)
    batch = padded([tokens(1, n, n) for n in (C + 3, 2, C)], "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for keywords in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        want = greedy(model, ids, attention_mask=mask, use_cache=False, **keywords)
        cache = DynamicCache(config=model.config)
        assert torch.equal(greedy(model, ids, attention_mask=mask, past_key_values=cache, **keywords), want)
        assert all(state.form == form and state.updates[0] >= 3 for state in states(cache))
        assert all(state.left is not None for state in states(cache))
    prompt = tokens(1, 3).repeat(1, 5)
    want = greedy(model, prompt, use_cache=False)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=2 * C + 1), want)
    assistant = formed(model_type, form, lr=-0.3)
    assistant.generation_config.num_assistant_tokens = C + 1
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(greedy(model, prompt, assistant_model=assistant), want)


@families
@exact_forms
@pytest.mark.parametrize("sizes", [(2 * C + 3, 1, 1, C), (1,) * (4 * C), (6 * C, 3, C), (C, C, C, C, C, C)])
def test_pieces(model_type, form, sizes):
    model, ids, cache = formed(model_type, form, decay=0.1), tokens(2, sum(sizes)), DynamicCache()
    got = torch.cat([read(model, cache, part) for part in ids.split(sizes, 1)], 1)
    assert_close(got, logits(model, ids), **TOLERANCE)
    for state in states(cache):
        assert (state.S is None) == (form == ALL or sum(sizes) // C * C < 20)


@families
@exact_forms
@pytest.mark.parametrize("drop", [1, C, 2 * C + 1])
def test_crop(model_type, form, drop):
    model, ids, cache = formed(model_type, form, decay=0.1), tokens(2, 3 * C + 1), DynamicCache()
    read(model, cache, ids)
    cache.crop(-drop)
    kept, more = ids[:, : ids.shape[1] - drop], tokens(2, 2 * C, seed=1)
    want = logits(model, torch.cat([kept, more], 1))[:, kept.shape[1] :]
    assert_close(read(model, cache, more), want, **TOLERANCE)


@exact_forms
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(form, how):
    model, ids, cache = formed("llama", form), tokens(2, 2 * C + 2), DynamicCache()
    read(model, cache, ids)
    if how == "deepcopy":
        other = copy.deepcopy(cache)
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    for one, more in ((cache, tokens(2, C + 1, seed=1)), (other, tokens(2, C + 1, seed=2))):
        want = logits(model, torch.cat([ids, more], 1))[:, ids.shape[1] :]
        for t in range(C + 1):
            assert_close(read(model, one, more[:, t : t + 1]), want[:, t : t + 1], **TOLERANCE)
        assert all(state.form == form and state.left is not None for state in states(one))


def test_a_cache_keeps_its_form():
    """Also over a reset with other rows; the runtime's form is that of caches that begin."""
    model, old, new = formed("llama", "auto"), DynamicCache(), DynamicCache()
    read(model, old, tokens(2, C))
    runtime_of(model).configure(form=7)
    for cache, form in ((old, "auto"), (new, 7)):
        read(model, cache, tokens(2, C))
        assert all(state.form == form and state.S is None for state in states(cache))
        for state in states(cache):
            state.reset()
        fast_layers(cache, dict.fromkeys(ittt.fast_weights(cache), False), 3, Settings(runtime_of(model).config))
        assert all(state.form == form and state.rows == 3 for state in states(cache))


def test_the_usual_form_is_dense():
    model, cache = adapted("llama"), DynamicCache()
    read(model, cache, tokens(1, C))
    assert all(state.form == "dense" and state.S is not None and not hasattr(state, "left") for state in states(cache))


class FastTensors(TorchDispatchMode):
    """Counts new tensors with S's two sides, and scans, which hide theirs; views of parameters are not new."""

    def __init__(self, model, sides):
        super().__init__()
        self.owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.sides, self.found, self.calls = sides, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found += func is torch.ops.inplace_ttt.scan.default
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.owned:
                self.found += sorted(x.shape[-2:]) == self.sides
                self.calls += 1
        return out


@families
@pytest.mark.parametrize("form", ["auto", ALL, 1, "dense"])
def test_a_decoding_step_makes_no_dense_state(model_type, form):
    """Whole steps of the model, in the middle of a chunk and at its end, for a batch of rows at different places."""
    model, cache = formed(model_type, form, decay=0.1), DynamicCache()
    batch = padded([tokens(1, n, n) for n in (C + 3, C)], "left")
    read(model, cache, batch["input_ids"], attention_mask=batch["attention_mask"])
    mask = batch["attention_mask"]
    with FastTensors(model, [32, 48]) as found:
        for t in range(C + 1):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            read(model, cache, tokens(2, 1, t), attention_mask=mask)
    assert found.calls > 100
    assert (found.found > 0) == (form == "dense")


def test_a_rank_that_does_not_suffice():
    """The error is there, small beside what the fast weights do, and known; the state does not depend on the pieces."""
    model, ids, rank = formed("llama", 4, lr=0.01), tokens(2, 15 * C), 4
    with ittt.updates_off(model):
        off = logits(model, ids)
    want, said = logits(model, ids), []
    for size in (15 * C, C - 1, 1):
        cache = DynamicCache()
        got = torch.cat([read(model, cache, part) for part in ids.split(size, 1)], 1)
        assert (
            size == 15 * C or 1e-3 < torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(off - want) < 0.9
        )
        for state in states(cache):
            assert max(state.count) <= 2 * rank
        said.append(states(cache)[0].truncation)
    assert 0.01 < min(said[0]) < max(said[0]) < 0.9
    assert said[1] == pytest.approx(said[0])
    assert said[2] == pytest.approx(said[0])
    assert greedy(model, ids[:1, : 2 * C], num_beams=2).shape == (1, 2 * C + NEW)
