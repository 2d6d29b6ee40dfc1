"""A small real model (260 thousand parameters, trained on children's stories), where it is there."""

import pytest
import torch
from locations import SHARED
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt

PATH = SHARED / "models" / "stories260K"
pytestmark = pytest.mark.skipif(not PATH.is_dir(), reason=f"no model at {PATH}")
CHUNK = 16


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PATH)


def load():
    return AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32).eval()


def story(tokenizer):
    text = "Once upon a time, there was a little girl named Lily. She loved to play with her red ball in the park."
    return tokenizer(text, return_tensors="pt")


def test_an_untrained_attachment_tells_the_same_story(tokenizer):
    model, batch = load(), story(tokenizer)
    settings = {"max_new_tokens": 40, "do_sample": False}
    with torch.no_grad():
        want, text = model(**batch).logits, model.generate(**batch, **settings)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=CHUNK))
    with torch.no_grad():
        assert torch.equal(model(**batch, use_cache=False).logits, want)
    assert torch.equal(model.generate(**batch, **settings), text)
    assert len(tokenizer.decode(text[0])) > 150


def test_adapting_pieces_save_and_load(tokenizer, tmp_path):
    """With weights as if trained: one call, pieces, a padded batch and a reload agree; generation equals no cache."""
    model, batch = load(), story(tokenizer)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=CHUNK, lr=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ttt_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        ids = batch["input_ids"]
        want = model(ids, use_cache=False).logits
        with ittt.updates_off(model):
            assert float((model(ids, use_cache=False).logits - want)[:, CHUNK:].abs().max()) > 0.1
        cache = DynamicCache(config=model.config)
        got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split(CHUNK - 5, 1)], 1)
    assert_close(got, want, atol=1e-3, rtol=0)
    settings = {"max_new_tokens": 30, "do_sample": False}
    text = model.generate(**batch, **settings)
    assert torch.equal(text, model.generate(**batch, use_cache=False, **settings))
    assert torch.equal(text, model.generate(**batch, prompt_lookup_num_tokens=5, **settings))
    ittt.save_pretrained(model, tmp_path, tokenizer)
    again = ittt.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert AutoTokenizer.from_pretrained(tmp_path)("Once")["input_ids"] == tokenizer("Once")["input_ids"]
    assert torch.equal(again.generate(**batch, **settings), text)
