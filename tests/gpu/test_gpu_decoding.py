"""Decoding on a GPU: CUDA graphs of one step serve every token, chunk after chunk."""

import pytest
import torch
from contract.families import C, adapted, tokens
from transformers.cache_utils import StaticCache

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
