"""attach changes nothing until trained, adapts only the layers asked for, and detach gives the plain model back."""

import copy

import pytest
import torch
from contract.families import BUILDERS, LAYERS, TARGETS, C, adapted, logits, plain, randomise, tokens
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.hf.families import FAMILIES
from inplace_ttt.hf.linear import FastWeight

families = pytest.mark.parametrize("model_type", sorted(BUILDERS))
targets = pytest.mark.parametrize("target", TARGETS)
EFFECT = 1e-2
"""Least change of a logit by these tests' fast weights; every tolerance of the suite is at most a hundredth of it."""


def structure(model):
    """Everything that attach could leave behind: types, attributes and hooks of every module."""
    return {
        name: (type(m), sorted(m.__dict__), *(len(h) for h in (m._forward_pre_hooks, m._forward_hooks)))
        for name, m in model.named_modules()
    }


def test_every_family_of_the_table_is_built_here():
    assert set(BUILDERS) == set(FAMILIES)
    for model_type, build in BUILDERS.items():
        assert build().model_type == model_type


@families
@pytest.mark.parametrize(("target", "dtype"), list(zip(TARGETS, (torch.float32, torch.bfloat16), strict=True)))
def test_identity_bit_for_bit(model_type, target, dtype):
    model = plain(model_type, dtype)
    ids, mask = tokens(2, 3 * C + 1), torch.ones(2, 3 * C + 1, dtype=torch.int64)
    mask[0, :3] = 0

    def outputs():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return [
                model(ids, use_cache=False).logits,
                model(ids, labels=ids, use_cache=False).loss,
                model(ids, attention_mask=mask, use_cache=False).logits,
                *(model(piece, past_key_values=cache).logits for piece in ids.split((C + 1, 1, 2 * C - 1), 1)),
                model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False),
            ]

    want = outputs()
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, target=target))
    assert ittt.is_attached(model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), want, strict=True))


@families
@targets
def test_fast_weights_matter_in_these_tests(model_type, target):
    """From the second chunk on, and only from there: the rest of the suite could not fail otherwise."""
    model, ids = adapted(model_type, target=target), tokens(2, 2 * C + 3)
    on = logits(model, ids)
    with ittt.updates_off(model):
        off = logits(model, ids)
    assert torch.equal(on[:, :C], off[:, :C])
    assert float((on - off)[:, C:].abs().amax(-1).min()) > EFFECT


@families
@targets
def test_detach_restores_the_model(model_type, target):
    model, ids = plain(model_type), tokens(2, 3 * C)
    before, weights, config = structure(model), copy.deepcopy(model.state_dict()), model.config.to_dict()
    want, places = logits(model, ids), dict(model.named_parameters())
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, target=target))
    assert model.config.inplace_ttt["chunk_size"] == C
    randomise(model)
    assert not torch.equal(logits(model, ids), want)
    assert ittt.detach(model) is model
    assert structure(model) == before
    assert model.config.to_dict() == config
    assert not hasattr(model.config, "inplace_ttt")
    assert not ittt.is_attached(model)
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[k], weights[k]) for k in weights)
    assert all(p is places[n] for n, p in model.named_parameters())
    assert torch.equal(logits(model, ids), want)


@families
def test_only_the_layers_asked_for_adapt(model_type):
    last = LAYERS - 1
    model, ids = adapted(model_type, layers=(last,)), tokens(1, 3 * C)
    layers = model.get_submodule(FAMILIES[model_type].layers)
    for i, layer in enumerate(layers):
        adapting = [n for n, m in layer.named_modules() if isinstance(m, FastWeight)]
        assert len(adapting) == (i == last)
        assert set(adapting) <= set(FAMILIES[model_type].projections)
        assert any("ttt_" in n for n, _ in layer.named_parameters()) == (i == last)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        hidden = model(ids, past_key_values=cache, output_hidden_states=True).hidden_states
        with ittt.updates_off(model):
            slow = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert set(ittt.fast_weights(cache)) == {last}
    assert all(torch.equal(a, b) for a, b in zip(hidden[: last + 1], slow[: last + 1], strict=True))
    assert float((hidden[-1] - slow[-1]).abs().max()) > EFFECT
