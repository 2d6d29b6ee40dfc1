"""Targets on whole models: however the tokens come, the logits are those of one call; saved and loaded they stay."""

import pytest
import torch
from contract.families import C, adapted, logits, plain, randomise, tokens
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import cache_name

OBJECTIVES = {
    "learned": {"objective_options": {"start": "next_token"}},
    "next_error": {"objective": "next_error", "objective_options": {"gates": True}},
    "next_error, norms": {"objective": "next_error", "rule": "norm_preserving"},
    "next_token": {"objective": "next_token", "target": "hidden_states"},
}
FAMILIES = ("llama", "gemma3_text", "gpt2")
cases = pytest.mark.parametrize("case", OBJECTIVES)
families = pytest.mark.parametrize("family", FAMILIES)


def settings(case):
    return ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, lr=0.3, **OBJECTIVES[case])


@families
@cases
def test_identity_at_the_start_and_no_saddle(family, case):
    """Nothing changes until it is trained, and one step of gradient descent is enough to change something."""
    model, ids = plain(family, torch.float32), tokens(2, 3 * C)
    want = logits(model, ids)
    ittt.attach(model, settings(case))
    assert torch.equal(logits(model, ids), want)
    assert not ittt.is_trained(model)
    model(ids, labels=ids).loss.backward()
    projections = {n: p for n, p in model.named_parameters() if ".ttt_" in n and n.endswith("proj.weight")}
    assert len(projections) == (4 if "error" in case else 2)
    for parameter in projections.values():
        assert parameter.grad.abs().max() > 0
        with torch.no_grad():
            parameter -= parameter.grad / parameter.grad.abs().max()
    assert ittt.is_trained(model)
    assert not torch.equal(logits(model, ids), want)


@families
@cases
def test_pieces_steps_and_generation_equal_one_call(family, case):
    model, ids = adapted(family, lr=0.1, **OBJECTIVES[case]), tokens(2, 3 * C + 2)
    want = logits(model, ids)
    with ittt.updates_off(model):
        assert float((want - logits(model, ids)).abs().max()) > 1e-3
    for sizes in ((C - 1, C + 1, C + 2), (1,) * (3 * C + 2)):
        cache, got = DynamicCache(config=model.config), []
        with torch.no_grad():
            for piece in ids.split(sizes, 1):
                got.append(model(piece, **{cache_name(model): cache}).logits)
        assert_close(torch.cat(got, 1), want, atol=1e-6, rtol=0)
    keywords = {"max_new_tokens": 2 * C, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    slow = model.generate(ids, use_cache=False, **keywords)
    assert torch.equal(model.generate(ids, **keywords), slow)
    start = tokens(2, C - 1)  # steps before the first update
    keywords |= {"attention_mask": torch.ones_like(start)}
    static = StaticCache(model.config, max_cache_len=4 * C)
    fixed = model.generate(start, past_key_values=static, disable_compile=True, **keywords)
    assert torch.equal(fixed, model.generate(start, use_cache=False, **keywords))


@cases
def test_saved_loaded_and_read_by_a_session(case, tmp_path):
    model, ids = plain("llama", torch.float32), tokens(1, 3 * C)
    ittt.attach(model, settings(case))
    ittt.save_pretrained(model, tmp_path / "untrained")
    assert not ittt.is_trained(ittt.from_pretrained(tmp_path / "untrained"))
    randomise(model)
    want = logits(model, ids)
    ittt.save_pretrained(model, tmp_path / "whole")
    ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True)
    whole = ittt.from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    adapter = ittt.from_pretrained(tmp_path / "adapter", model=plain("llama", torch.float32))
    for again in (whole, adapter):
        assert again.config.inplace_ttt == model.config.inplace_ttt
        assert ittt.is_trained(again)
        assert torch.equal(logits(again, ids), want)
    session = ittt.Session(whole, decay=0.0)
    session.read(ids[0, : C + 2].tolist())
    session.save(tmp_path / "session")
    loaded = ittt.Session.load(tmp_path / "session", whole)
    loaded.read(ids[0, C + 2 :].tolist())
    assert_close(loaded.next_logits, want[0, -1], atol=1e-4, rtol=0)
