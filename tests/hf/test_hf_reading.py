"""How an attached model reads can be changed; a call that broke off is noticed."""

import pytest
import torch
from contract.families import C, adapted, logits, tokens
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt

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


def test_a_call_that_broke_off_is_noticed():
    model, cache = adapted("llama"), DynamicCache()

    def stop(*_):
        raise KeyboardInterrupt

    with torch.no_grad():
        model(IDS, past_key_values=cache)
        handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(IDS, past_key_values=cache)
        handle.remove()
        with pytest.raises(ValueError, match="broke off half way"):
            model(IDS, past_key_values=cache)
        model(IDS, past_key_values=DynamicCache())


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
