"""Whatever decoding does to the keys happens to the fast weights: each equals decoding without a cache."""

import pytest
import torch
from contract.families import (
    BUILDERS,
    LINEAR,
    PADDED_DTYPE,
    RECURRENT,
    C,
    adapted,
    logits,
    one_target_each,
    padded,
    tokens,
    tolerance,
)
from torch.testing import assert_close
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt
from inplace_ttt.core import FastWeights

DRAFTED = set(BUILDERS) - LINEAR
"""Transformers itself refuses to draft for the others."""
NEW = 2 * C + 1
"""Tokens of a draft's text: two chunks are completed and one begun."""


def greedy(model, prompt, n, **keywords):
    return model.generate(prompt, max_new_tokens=n, do_sample=False, **keywords)


@pytest.fixture
def rollbacks(monkeypatch):
    """Counts what was taken back: tokens dropped, chunks reopened."""
    counts = {"tokens": 0, "chunks": 0}
    rollback, reopen = FastWeights.rollback, FastWeights._reopen

    def count_tokens(self, tokens):
        counts["tokens"] += tokens
        return rollback(self, tokens)

    def count_chunks(self, b, chunks):
        counts["chunks"] += chunks
        return reopen(self, b, chunks)

    monkeypatch.setattr(FastWeights, "rollback", count_tokens)
    monkeypatch.setattr(FastWeights, "_reopen", count_chunks)
    return counts


@one_target_each()
def test_beam_search(model_type, target):
    model, prompt = adapted(model_type, target=target), tokens(2, C + 2)
    keywords = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    cached = greedy(model, prompt, 2 * C + 1, **keywords)
    plain = greedy(model, prompt, 2 * C + 1, use_cache=False, **keywords)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=0)
    moved = torch.as_tensor(cached.beam_indices)
    assert len({tuple(row.tolist()) for row in moved}) > 1


@one_target_each(1, DRAFTED)
def test_assisted_by_a_model(model_type, target, rollbacks):
    """The assistants adapt too; one is mostly right, the other mostly wrong.

    They look further back than the model: transformers 5.17 itself cannot draft with a sliding window.
    """
    text = BUILDERS[model_type]().get_text_config()
    wide = {name: 256 for name in ("sliding_window", "attention_chunk_size") if getattr(text, name, None)}
    model, prompt = adapted(model_type, target=target), tokens(1, C + 2)
    want = greedy(model, prompt, NEW, use_cache=False)
    for lr in (0.02, -0.3):
        assistant = adapted(model_type, changes=wide, target=target, lr=lr)
        assistant.generation_config.num_assistant_tokens = C + 1
        assistant.generation_config.num_assistant_tokens_schedule = "constant"
        assistant.generation_config.assistant_confidence_threshold = 0.0
        assert torch.equal(greedy(model, prompt, NEW, assistant_model=assistant), want)
    assert rollbacks["tokens"] > 0


@one_target_each(0, DRAFTED)
def test_assisted_by_prompt_lookup(model_type, target):
    model, prompt = adapted(model_type, target=target), tokens(1, C + 2).repeat(1, 3)
    want = greedy(model, prompt, 3 * C, use_cache=False)
    assert torch.equal(greedy(model, prompt, 3 * C, prompt_lookup_num_tokens=C + 1), want)


@one_target_each()
def test_crop(model_type, target, rollbacks):
    model, ids, other = adapted(model_type, target=target), tokens(2, 3 * C + 1), tokens(2, 2 * C + 1, seed=1)
    for drop in (0, 1, C - 1, C, 2 * C + 1, 3 * C + 1):
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        rollbacks["chunks"] = 0
        with torch.no_grad():
            model(ids, past_key_values=cache)
            if model_type in LINEAR and drop:
                with pytest.raises(NotImplementedError, match="linear attention cannot take tokens back"):
                    cache.crop(-drop)
                continue
            cache.crop(-drop)
            if cache.get_seq_length() == 0:
                assert all(state.seen == (0, 0) for state in ittt.fast_weights(cache).values())
                continue
            got = model(other, past_key_values=cache).logits
        kept = ids[:, : ids.shape[1] - drop]
        assert_close(got, logits(model, torch.cat([kept, other], 1))[:, kept.shape[1] :], **tolerance(model_type))
        assert (rollbacks["chunks"] > 0) == (drop > 1)


@one_target_each(1)
def test_rows_follow_the_cache(model_type, target):
    """reorder_cache, batch_select_indices and batch_repeat_interleave, with every row at another place in its chunk."""
    dtype = PADDED_DTYPE.get(model_type, torch.float64)
    model = adapted(model_type, dtype, target=target)
    cache, order = DynamicCache(config=model.config), torch.arange(3)
    rows = [tokens(1, n, n) for n in (2 * C + 2, 3, C + 3)]

    def read(new):
        batch = padded(rows, "left")
        ids, positions = batch["input_ids"][:, -new:], batch["position_ids"][:, -new:]
        mask = batch["attention_mask"]
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits

    with torch.no_grad():
        read(2 * C + 2)
        for act, chosen in (
            (lambda: cache.reorder_cache(torch.tensor([2, 0, 0])), torch.tensor([2, 0, 0])),
            (lambda: cache.batch_select_indices(torch.tensor([0, 1])), torch.tensor([0, 1])),
            (lambda: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
            (lambda: cache.reorder_cache(torch.tensor([3, 1, 0, 2])), torch.tensor([3, 1, 0, 2])),
        ):
            if model_type in RECURRENT and len(chosen) != len(rows):
                continue
            act()
            order = order[chosen]
            rows = [torch.cat([rows[b], tokens(1, 3, seed=50 + b)], 1) for b in chosen.tolist()]
            for row, got in zip(rows, read(3), strict=True):
                want = logits(model, row)[0, -3:]
                assert_close(got, want, **tolerance(model_type, dtype))
    assert order.tolist() == ([2, 0, 0] if model_type in RECURRENT else [0, 2, 2, 0])
