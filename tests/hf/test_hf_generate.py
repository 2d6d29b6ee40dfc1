"""generate() as users call it. Greedy text is checked against a loop of full forwards that knows no cache."""

import pytest
import torch
from contract.families import TARGETS, C, adapted, logits, one_target_each, padded, tokens
from torch.testing import assert_close
from transformers import set_seed
from transformers.cache_utils import DynamicCache, StaticCache

import inplace_ttt as ittt

NEW = 2 * C + 1
FAMILIES = ("llama", "gpt2", "gemma3_text", "mistral")
families = pytest.mark.parametrize("model_type", FAMILIES)
targets = pytest.mark.parametrize("target", TARGETS)


def by_hand(model, prompt, n=NEW):
    """Greedy decoding without generate() and without a cache."""
    ids = prompt
    for _ in range(n):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def batch_of(rows, side="left"):
    """What a tokenizer gives: ids and mask."""
    batch = padded(rows, side)
    del batch["position_ids"]
    return batch


def greedy(model, *args, n=NEW, **keywords):
    """With a mask, since generate() takes the padding token for padding otherwise, where a model wrote one itself."""
    ids = args[0] if args else keywords.get("input_ids", keywords.get("inputs"))
    if ids is not None:
        keywords.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(*args, max_new_tokens=n, do_sample=False, **keywords)


@one_target_each(0, FAMILIES)
def test_positional_keyword_and_without_cache(model_type, target):
    model, prompt = adapted(model_type, target=target), tokens(2, C + 2)
    want = by_hand(model, prompt)
    mask = torch.ones_like(prompt)
    assert torch.equal(greedy(model, prompt), want)
    assert torch.equal(greedy(model, input_ids=prompt), want)
    assert torch.equal(greedy(model, inputs=prompt, attention_mask=mask), want)
    assert torch.equal(greedy(model, prompt, use_cache=False), want)
    with torch.inference_mode():
        assert torch.equal(greedy(model, prompt), want)
    model.train()
    assert torch.equal(greedy(model, prompt), want)


@one_target_each(1, FAMILIES)
@pytest.mark.parametrize("chunk", [None, 3])
def test_left_padded_batch_equals_its_rows(model_type, target, chunk):
    model = adapted(model_type, target=target)
    rows = [tokens(1, n, n) for n in (2 * C + 1, 2, C + 1)]
    got = greedy(model, **batch_of(rows), **({} if chunk is None else {"prefill_chunk_size": chunk}))
    for row, out in zip(rows, got, strict=True):
        assert torch.equal(out[2 * C + 1 :], by_hand(model, row)[0, row.shape[1] :])


def test_eager_gemma2_with_padding():
    model = adapted("gemma2", torch.float32)
    rows = [tokens(1, n, n) for n in (2 * C + 1, 2, C + 1)]
    for row, out in zip(rows, greedy(model, **batch_of(rows)), strict=True):
        assert torch.equal(out[2 * C + 1 :], by_hand(model, row)[0, row.shape[1] :])


@targets
@pytest.mark.parametrize("several", [{}, {"num_return_sequences": 3}, {"num_return_sequences": 3, "num_beams": 3}])
def test_sampling_equals_sampling_without_cache(target, several):
    model = adapted("llama", target=target)
    batch = batch_of([tokens(1, n, n) for n in (C + 3, 2)])
    outs = []
    for use_cache in (True, False):
        set_seed(5)
        outs.append(
            model.generate(
                **batch, max_new_tokens=NEW, do_sample=True, top_k=20, temperature=0.8, use_cache=use_cache, **several
            )
        )
    assert torch.equal(*outs)
    assert len(outs[0]) == 2 * several.get("num_return_sequences", 1)
    assert len({tuple(row.tolist()) for row in outs[0]}) == len(outs[0])


@families
def test_beams_on_a_padded_batch(model_type):
    model = adapted(model_type)
    batch = batch_of([tokens(1, n, n) for n in (C + 3, 2, C)])
    keywords = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5}
    assert torch.equal(greedy(model, **batch, **keywords), greedy(model, **batch, use_cache=False, **keywords))


@families
def test_assisted_in_long_drafts_and_sampling(model_type):
    """Drafts longer than a chunk: rejected ones reopen several chunks."""
    model, prompt = adapted(model_type), tokens(1, 3).repeat(1, 5)
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3 * C), by_hand(model, prompt))


def test_assisted_by_its_own_early_layers():
    model, prompt = adapted("llama"), tokens(1, C + 2)
    assert torch.equal(greedy(model, prompt, assistant_early_exit=1), by_hand(model, prompt))


@one_target_each(0, FAMILIES)
@pytest.mark.parametrize("make", ["with config", "without config", "none"])
def test_a_cache_continued_over_two_calls(model_type, target, make):
    model, prompt = adapted(model_type, target=target), tokens(1, C + 2)
    cache = None
    if make != "none":
        cache = DynamicCache(config=model.config) if make == "with config" else DynamicCache()
    first = greedy(model, prompt, past_key_values=cache, return_dict_in_generate=True)
    assert torch.equal(first.sequences, by_hand(model, prompt))
    turn = torch.cat([first.sequences, tokens(1, C + 1, 1)], 1)
    cache = first.past_key_values if cache is None else cache
    assert torch.equal(greedy(model, turn, past_key_values=cache), by_hand(model, turn))


@one_target_each(0, FAMILIES)
def test_a_cache_continued_in_a_padded_batch(model_type, target):
    """Two turns; the second pads too, so a row's text has a hole in the middle (which a sliding window counts)."""
    model = adapted(model_type, target=target)
    prompts, turns = ([tokens(1, n, n) for n in sizes] for sizes in ((C + 3, 2), (1, C + 2)))
    batch = batch_of(prompts)
    cache = DynamicCache(config=model.config)
    first = greedy(model, **batch, past_key_values=cache, n=C)
    second = batch_of(turns)
    ids = torch.cat([first, second["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, C, dtype=torch.int64), second["attention_mask"]], 1)
    got = greedy(model, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(got, greedy(model, ids, attention_mask=mask, use_cache=False))
    for b in range(2 if model_type in ("llama", "gpt2") else 0):
        text = torch.cat([by_hand(model, prompts[b], C), turns[b]], 1)
        assert torch.equal(got[b, ids.shape[1] :], by_hand(model, text)[0, text.shape[1] :])


@one_target_each(1, ("llama", "gemma3_text", "mistral", "qwen3"))
@pytest.mark.parametrize(("pad", "chunk"), [(False, None), (False, 1), (True, None), (True, 3)])
def test_static_cache(model_type, target, pad, chunk):
    model = adapted(model_type, target=target)
    rows = [tokens(1, n, n) for n in ((2 * C + 1, 2, C + 1) if pad else (C + 2, C + 2))]
    more = {} if chunk is None else {"prefill_chunk_size": chunk}
    got = greedy(model, **batch_of(rows), cache_implementation="static", **more)
    width = max(row.shape[1] for row in rows)
    for row, out in zip(rows, got, strict=True):
        assert torch.equal(out[width:], by_hand(model, row)[0, row.shape[1] :])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_static_cache_object_in_pieces(model_type):
    model, ids = adapted(model_type), tokens(2, 3 * C)
    cache, want = StaticCache(config=model.config, max_cache_len=3 * C + 2), logits(model, ids)
    with torch.no_grad():
        got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split((C + 1, 1, 2 * C - 2), 1)], 1)
    assert_close(got, want, atol=1e-6, rtol=0)
    assert cache.is_compileable, "transformers leaves out the mask of a decoding step for other static caches"


@one_target_each(1, FAMILIES)
def test_inputs_embeds(model_type, target):
    model, prompt = adapted(model_type, target=target), tokens(2, 2 * C + 1)
    embeds = model.get_input_embeddings()(prompt).detach()
    want = by_hand(model, prompt)
    assert torch.equal(greedy(model, inputs_embeds=embeds), want[:, prompt.shape[1] :])
    assert torch.equal(greedy(model, prompt, inputs_embeds=embeds), want)
    assert torch.equal(greedy(model, inputs_embeds=embeds, use_cache=False), want[:, prompt.shape[1] :])
    assert_close(logits(model, None, inputs_embeds=embeds), logits(model, prompt))


def test_set_lr_and_updates_off_reach_generation():
    model, prompt = adapted("llama"), tokens(1, 2 * C)
    on = greedy(model, prompt)
    with ittt.updates_off(model):
        off = greedy(model, prompt)
        assert torch.equal(off, by_hand(model, prompt))
    ittt.set_lr(model, 0.0)
    assert torch.equal(greedy(model, prompt), off)
    ittt.set_lr(model, 0.03)
    assert torch.equal(greedy(model, prompt), on)
    assert not torch.equal(on, off)
