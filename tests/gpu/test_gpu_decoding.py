"""Decoding on a GPU: CUDA graphs of one step serve every token, chunk after chunk."""

import pytest
import torch
from contract.families import C, adapted, tokens
from transformers.cache_utils import StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import cache_name

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("model_type", "rows"), [("llama", 1), ("llama", 3), ("gpt2", 1)])
def test_graphs_of_a_step_equal_one_pass(model_type, rows):
    torch.compiler.reset()
    model, ids = adapted(model_type).cuda().float(), tokens(rows, 6 * C + 1).cuda()
    name, step = cache_name(model), torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        for _ in range(2):  # the second time with another cache
            cache = StaticCache(model.config, max_cache_len=64)
            got = [model(ids[:, : C + 2], **{name: cache}).logits]
            for i in range(C + 2, ids.shape[1]):
                got.append(step(ids[:, i : i + 1].clone(), **{name: cache}).logits.clone())
            torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=1e-4)


def test_generate_with_a_static_cache_writes_the_same():
    torch.compiler.reset()
    model, prompt = adapted("llama").cuda().float(), tokens(2, C + 1).cuda()
    settings = {"max_new_tokens": 4 * C, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    want = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, **settings, cache_implementation="static"), want)
    assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_graph_serves_every_token_and_prompt(compiled, rows):
    torch.compiler.reset()
    model = adapted("llama").cuda().float()
    name, cache = cache_name(model), StaticCache(model.config, max_cache_len=8 * C)
    graph, captured = None, []
    for seed in range(3):
        ids = tokens(rows, 6 * C + 1, seed).cuda()
        if seed == 2:
            ittt.set_lr(model, 0.02)
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
            cache.reset()
            got = [model(ids[:, : C + seed], **{name: cache}).logits]
        graph = graph or ittt.DecodingGraph(model, cache, compiled=compiled)
        for i in range(C + seed, ids.shape[1]):
            got.append(graph(ids[:, i : i + 1]).clone())
            captured.append(graph._graph)
        torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=1e-4)
    assert len(set(map(id, captured))) == 1


def test_a_graph_of_a_plain_model():
    model, ids = ittt.detach(adapted("llama")).cuda().float(), tokens(2, 3 * C).cuda()
    name, cache = cache_name(model), StaticCache(model.config, max_cache_len=3 * C)
    with torch.no_grad():
        got = [model(ids[:, :C], **{name: cache}).logits]
        graph = ittt.DecodingGraph(model, cache, compiled=False)
        got += [graph(token).clone() for token in ids[:, C:].split(1, 1)]
        torch.testing.assert_close(torch.cat(got, 1), model(ids, use_cache=False).logits, atol=2e-4, rtol=1e-4)
    with pytest.raises(ittt.UserError, match="the cache is full: it holds 12 tokens"):
        graph(ids[:, -1:])


def test_padded_rows_are_refused():
    model, ids = adapted("llama").cuda().float(), tokens(2, C).cuda()
    name, cache, mask = cache_name(model), StaticCache(model.config, max_cache_len=3 * C), torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, **{name: cache})
    with pytest.raises(ittt.UserError, match="rows of one length"):
        ittt.DecodingGraph(model, cache)(ids[:, -1:])
