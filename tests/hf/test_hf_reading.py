"""How an attached model reads can be changed; a call that broke off is noticed."""

import gc
import weakref

import pytest
import torch
from contract.families import C, adapted, logits, plain, tokens
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.cache import cache_name

IDS = tokens(2, 5 * C + 3)


@pytest.mark.parametrize("settings", [{"chunk_size": 2}, {"decay": 0.5}, {"lr": 0.1}, {"clip": 0.01}])
def test_configure_equals_attaching_with_the_settings(settings, tmp_path):
    from dataclasses import replace

    model = adapted("llama")
    before, parameters = logits(model, IDS), {k: v for k, v in model.state_dict().items() if "ttt_" in k}
    config = ittt.hf.attach.runtime_of(model).config
    ittt.configure(model, **settings)
    got = logits(model, IDS)
    assert (got - before).abs().max() > 1e-4
    ittt.save_pretrained(model, tmp_path)
    assert_close(logits(ittt.from_pretrained(tmp_path), IDS), got)
    ittt.detach(model)
    ittt.attach(model, replace(config, **settings)).load_state_dict(parameters, strict=False)
    assert_close(logits(model, IDS), got)


def test_configure_refuses_what_needs_other_parameters():
    model = adapted("llama")
    with pytest.raises(ittt.UserError, match="cannot change conv_kernel of an attached model"):
        ittt.configure(model, conv_kernel=3)
    with pytest.raises(ittt.UserError, match="decay must be in"):
        ittt.configure(model, decay=1.0)
    assert ittt.fast_settings(model)["decay"] == 0.0


@pytest.mark.parametrize("settings", [{"chunk_size": 2}, {"decay": 0.5}])
def test_a_cache_filled_with_other_settings_is_refused(settings):
    model, cache = adapted("llama"), DynamicCache()
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        ittt.configure(model, **settings)
        with pytest.raises(ValueError, match="this cache was filled"):
            model(IDS, past_key_values=cache)


def reader(objective):
    if objective == "learned":
        return adapted("llama")
    return ittt.attach(plain("llama"), ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, clip=0.3))


class Breaking:
    """Breaks a call off in one module, and knows the tensors that the call made until then."""

    def __init__(self, model, name, error):
        self.made, self.error = [], error
        self.handles = [module.register_forward_hook(self.watch) for module in model.modules()]
        self.handles.append(model.get_submodule(name).register_forward_pre_hook(self.stop))

    def watch(self, module, args, output):
        found = [x for x in (*args, output) if isinstance(x, torch.Tensor) and x is not IDS]
        self.made += [weakref.ref(x) for x in found if not isinstance(x, torch.nn.Parameter)]

    def stop(self, module, args):
        raise self.error("in the middle")

    def remove(self):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("objective", ["learned", "loss"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.norm", "lm_head"]
)
def test_a_call_that_breaks_off_leaves_nothing(name, error, objective):
    """No tensor of it is held, and the next call is right."""
    model = reader(objective)
    want = logits(model, IDS)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            breaking = Breaking(model, name, error)
            with pytest.raises(error):
                model(IDS, use_cache=True)
            breaking.remove()
        gc.collect()  # fast: what was there before is frozen (tests/conftest.py)
        assert len(breaking.made) > 3
        assert not [x for x in breaking.made if x() is not None]
        assert runtime_of(model).current is None
        assert_close(logits(model, IDS), want, atol=0, rtol=0)


@pytest.mark.parametrize("objective", ["learned", "loss"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp", "model.norm"])
@pytest.mark.parametrize("new", [1, C + 1])
def test_a_cache_that_a_broken_call_left_is_refused(new, name, error, objective):
    """Its keys and fast weights are of some layers only, also behind the last adapting one; reset makes it good."""
    model, cache = reader(objective), StaticCache(plain("llama").config, max_cache_len=8 * C)
    keywords = {cache_name(model): cache}
    with torch.no_grad():
        model(IDS, **keywords)
        breaking = Breaking(model, name, error)
        with pytest.raises(error):
            model(IDS[:, :new], **keywords)
        breaking.remove()
        del breaking
        with pytest.raises(ValueError, match="broke off half way"):
            model(IDS[:, :new], **keywords)
        cache.reset()
        assert_close(model(IDS, **keywords).logits, logits(model, IDS), atol=1e-9, rtol=0)


def test_a_call_that_fails_before_it_begins_leaves_the_cache_alone():
    model, cache = adapted("llama"), DynamicCache()
    keywords = {cache_name(model): cache}
    with torch.no_grad():
        model(IDS[:, :C], **keywords)
        with pytest.raises(IndexError):
            model(torch.full((2, 1), 10**6), **keywords)
        found = model(IDS[:, C:], **keywords).logits
    assert_close(found, logits(model, IDS)[:, C:], atol=1e-9, rtol=0)


def test_a_call_that_is_refused_inside_another_leaves_the_other_alone():
    """A hook of the model calls it wrongly and goes on."""
    model = adapted("llama")
    want = logits(model, IDS)

    def wrong(*_):
        handle.remove()
        with pytest.raises(ValueError, match="needs input_ids"):
            model.model()

    handle = model.model.layers[1].register_forward_pre_hook(wrong)
    assert_close(logits(model, IDS), want, atol=0, rtol=0)


def test_layers_off_equals_a_model_that_adapts_in_the_other_layers_only():
    model = adapted("llama", layers=(0, 1, 2))
    everything = logits(model, IDS)
    state = model.state_dict()
    others = adapted("llama", layers=(0, 2))
    others.load_state_dict({k: v for k, v in state.items() if "layers.1.mlp.ttt" not in k})
    with ittt.layers_off(model, [1]):
        got = logits(model, IDS)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            pieces = [model(IDS[:, i : i + 5], past_key_values=cache).logits for i in range(0, IDS.shape[1], 5)]
        assert sorted(ittt.fast_weights(cache)) == [0, 2]
    assert_close(got, logits(others, IDS))
    assert_close(torch.cat(pieces, 1), got)
    assert (got - everything).abs().max() > 1e-3
    assert_close(logits(model, IDS), everything)
    with ittt.layers_off(model, [0, 1, 2]):
        none = logits(model, IDS)
    with ittt.updates_off(model):
        assert_close(logits(model, IDS), none)


def test_layers_off_refuses_layers_that_do_not_adapt():
    model = adapted("llama")
    with pytest.raises(ittt.UserError, match="do not adapt"), ittt.layers_off(model, [1, 9]):
        pass
