"""Decoding steps: one token after another, on fixed buffers and folded weights, equals reading it all at once."""

import copy

import pytest
import torch
from contract.families import ONE_LAYER, C, adapted, logits, padded, tokens
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformers import CompileConfig, GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt
import inplace_ttt.hf.steps as hf_steps
from inplace_ttt.hf.cache import FastCacheLayer, cache_name
from inplace_ttt.hf.steps import Step
from inplace_ttt.session.stream import whole

FAMILIES = ("llama", "gpt2", "gemma3_text")
LONG = 3 * C + 2
KINDS = ("dynamic", "static")


def empty(model, kind):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)


def call(model, cache, ids, **keywords):
    return model(ids, **{cache_name(model): cache}, **keywords).logits


def fast_layers(cache):
    return [layer for layer in cache.layers if isinstance(layer, FastCacheLayer)]


@pytest.fixture
def steps(monkeypatch):
    """How many steps were taken so far."""
    taken, begin = [], Step.begin

    def counting(*args):
        step = begin(*args)
        taken.extend([step] if step is not None else [])
        return step

    monkeypatch.setattr(Step, "begin", staticmethod(counting))
    return taken


@pytest.fixture
def dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"target": "hidden_states", "decay": 0.1, "clip": 0.5}])
@pytest.mark.parametrize("rows", [1, 2])
def test_steps_equal_one_pass(model_type, kind, settings, rows, steps):
    model, ids = adapted(model_type, **settings), tokens(rows, LONG)
    cache, want = empty(model, kind), logits(model, ids)
    with torch.no_grad():
        got = [call(model, cache, part) for part in ids.split((C + 1, *[1] * (LONG - C - 1)), 1)]
    assert len(steps) == LONG - C - 1
    assert_close(torch.cat(got, 1), want, atol=1e-6, rtol=0)
    assert {layer.fast.updates for layer in fast_layers(cache)} == {(3,) * rows}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_rows_complete_their_chunks_at_different_times(model_type, steps):
    model = adapted(model_type)
    rows = [tokens(1, n, seed) for seed, n in enumerate((C + 3, 2 * C, 2))]
    batch, more = padded(rows, "left"), tokens(3, 2 * C + 1, seed=9)
    mask, position, cache = batch["attention_mask"], batch["position_ids"], empty(model, "dynamic")
    with torch.no_grad():
        call(model, cache, batch["input_ids"], attention_mask=mask, position_ids=position)
        got = []
        for token in more.split(1, 1):
            mask, position = torch.nn.functional.pad(mask, (0, 1), value=1), position[:, -1:] + 1
            got.append(call(model, cache, token, attention_mask=mask, position_ids=position))
    assert len(steps) == more.shape[1]
    for b, row in enumerate(rows):
        want = logits(model, torch.cat([row, more[b : b + 1]], 1))[:, row.shape[1] :]
        assert_close(torch.cat(got, 1)[b : b + 1], want, atol=1e-6, rtol=0)


def test_padding_in_a_step_is_no_token(steps):
    model, ids = adapted("llama"), tokens(2, C + 3)
    cache = empty(model, "dynamic")
    with torch.no_grad():
        call(model, cache, ids[:, :-1])
        mask = torch.ones_like(ids)
        mask[1, -1] = 0
        call(model, cache, ids[:, -1:], attention_mask=mask)
    assert not steps
    assert {layer.fast.seen for layer in fast_layers(cache)} == {(C + 3, C + 2)}


def test_what_changes_between_two_steps_counts(steps):
    """The folded weight follows the inner learning rate and the slow weights."""
    model, ids = adapted("llama"), tokens(1, 2 * C + 3)
    head, last = ids.split((2 * C + 1, 2), 1)

    def last_logits(change, when):
        cache = empty(changed := copy.deepcopy(model), "dynamic")
        with torch.no_grad():
            call(changed, cache, head[:, :-1])
            for i, token in enumerate((head[:, -1:], *last.split(1, 1))):
                if i == when:
                    change(changed)
                out = call(changed, cache, token)
        return out

    def weights(model):
        site = ittt.hf.attach.runtime_of(model).sites[0]
        site.projection().weight.mul_(1.5)

    plain = last_logits(lambda model: None, 0)
    for change in (weights, lambda model: ittt.set_lr(model, 0.0)):
        assert not torch.allclose(last_logits(change, 2), plain, atol=1e-4)
    assert steps


@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_ways(kind):
    model, ids, other = adapted("llama"), tokens(1, LONG), tokens(1, LONG, seed=5)
    cache = empty(model, kind)
    with torch.no_grad():
        for part in ids[:, : C + 2].split((C, 1, 1), 1):
            call(model, cache, part)
        twin = copy.deepcopy(cache)
        for i in range(C + 2, LONG):
            mine, yours = call(model, cache, ids[:, i : i + 1]), call(model, twin, other[:, i : i + 1])
    assert_close(mine[:, -1], logits(model, ids)[:, -1], atol=1e-6, rtol=0)
    mixed = torch.cat([ids[:, : C + 2], other[:, C + 2 :]], 1)
    assert_close(yours[:, -1], logits(model, mixed)[:, -1], atol=1e-6, rtol=0)


def test_steps_are_taken_back():
    model, ids = adapted("llama"), tokens(1, LONG)
    cache = empty(model, "dynamic")
    with torch.no_grad():
        for part in ids.split((C + 1, *[1] * (LONG - C - 1)), 1):
            call(model, cache, part)
        cache.crop(-(C + 1))
        got = [call(model, cache, token) for token in ids[:, LONG - C - 1 :].split(1, 1)]
    assert_close(torch.cat(got, 1), logits(model, ids)[:, LONG - C - 1 :], atol=1e-6, rtol=0)


def test_a_step_that_breaks_off_can_be_tried_again():
    """Once the cache is taken back, as sessions do it."""
    model, ids = adapted("llama"), tokens(1, C + 3)
    cache, last = empty(model, "dynamic"), ittt.hf.attach.runtime_of(model).sites[-1]
    with torch.no_grad():
        call(model, cache, ids[:, : C + 1])
        call(model, cache, ids[:, C + 1 : C + 2])
        before = [layer.fast.seen for layer in fast_layers(cache)]
        broken = last.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), whole(cache):
            call(model, cache, ids[:, -1:])
        broken.remove()
        assert [layer.fast.seen for layer in fast_layers(cache)] == before
        got = call(model, cache, ids[:, -1:])
    assert_close(got, logits(model, ids)[:, -1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("model_type", "rows"), [("llama", 1), ("gpt2", 2)])
def test_a_compiled_step_serves_every_token(model_type, rows, dynamo):
    """No compilation after the first steps: neither for a later token nor when a chunk is complete."""
    model, ids = adapted(model_type, changes=ONE_LAYER), tokens(rows, 4 * C + 2)
    counter, cache = CompileCounter(), empty(model, "static")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        got = [call(model, cache, ids[:, : C - 1])]
        for i in range(C - 1, ids.shape[1]):
            got.append(call(compiled, cache, ids[:, i : i + 1]))
            if i == C:
                first = counter.frame_count
    assert 0 < first == counter.frame_count
    assert_close(torch.cat(got, 1), logits(model, ids), atol=1e-6, rtol=0)


def test_static_buffers_stay_where_they_are_when_a_cache_is_used_again():
    model, ids = adapted("llama"), tokens(2, C + 3)
    cache, found = empty(model, "static"), []
    for _ in range(2):
        with torch.no_grad():
            got = [call(model, cache, part) for part in ids.split((C, 1, 1, 1), 1)]
        assert_close(torch.cat(got, 1), logits(model, ids), atol=1e-6, rtol=0)
        steps = [layer.steps for layer in fast_layers(cache)]
        found.append([x.data_ptr() for s in steps for x in (s.z, s.u, s.folded)])
        cache.reset()
    assert found[0] == found[1]


def test_generate_compiles_single_steps_only(dynamo):
    """transformers compiles decoding with a static cache by itself (where it would pay, or where it is told to)."""
    model, prompt = adapted("llama"), tokens(2, C + 1)
    settings = {"max_new_tokens": 2 * C, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **settings)
    how = CompileConfig(backend="eager")
    how._compile_all_devices = True
    got = model.generate(prompt, **settings, cache_implementation="static", compile_config=how)
    assert torch.equal(got, want)
    assert hasattr(model, "_compiled_call")
    given = dict.fromkeys(("cache", "past_key_values"), empty(model, "static"))
    assert model._valid_auto_compile_criteria(given, GenerationConfig(compile_config=how)) is True
    pieces = GenerationConfig(compile_config=how, prefill_chunk_size=3)
    assert model._valid_auto_compile_criteria(given, pieces) is False


def test_a_shallow_copy_of_a_state_writes_into_its_own_buffers():
    model, ids = adapted("llama"), tokens(1, C + 3)
    cache = empty(model, "dynamic")
    with torch.no_grad():
        for part in ids.split((C + 1, 1, 1), 1):
            call(model, cache, part)
    layer = fast_layers(cache)[0]
    twin = copy.copy(layer)
    twin.fast = copy.copy(layer.fast)
    assert layer.begin_step(None, 1.0).z.data_ptr() != twin.begin_step(None, 1.0).z.data_ptr()
    assert torch.equal(layer.fast.z, twin.fast.z)


def test_what_a_cuda_graph_cannot_do_is_said():
    model, ids = adapted("llama"), tokens(1, C)
    cache = empty(model, "static")
    with torch.no_grad():
        call(model, cache, ids)
    with pytest.raises(ittt.UserError, match="needs a CUDA device, the model is on cpu"):
        ittt.DecodingGraph(model, cache)


def test_generate_s_own_tokens_need_no_look_at_the_mask(monkeypatch, steps):
    """A look would wait for the device in every step. Afterwards masks count again."""
    looks, look = [], hf_steps.read_mask
    monkeypatch.setattr(hf_steps, "read_mask", lambda *args: looks.append(args) or look(*args))
    model, prompt = adapted("llama"), tokens(2, C + 1)
    mask = torch.ones_like(prompt)
    mask[0, 0] = 0
    for kind in KINDS:
        looks.clear(), steps.clear()
        cache = empty(model, kind)
        settings = {"max_new_tokens": 4, "do_sample": False, cache_name(model): cache, "eos_token_id": None}
        out = model.generate(prompt, attention_mask=mask, **settings)
        assert (len(looks), len(steps)) == (0, 3)
    cache = empty(model, "dynamic")
    out = model.generate(prompt, attention_mask=mask, **settings | {cache_name(model): cache})
    after = torch.nn.functional.pad(mask, (0, 4), value=1)
    after[1, -1] = 0
    looks.clear()
    with torch.no_grad():
        call(model, cache, out[:, -1:], attention_mask=after)
    assert len(looks) == 1
    assert {layer.fast.seen for layer in fast_layers(cache)} == {(C + 4, C + 4)}
