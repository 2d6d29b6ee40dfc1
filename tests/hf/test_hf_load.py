"""Loading a model by one name: tokenizers that were converted wrongly are refused."""

import itertools
import struct
from functools import partial
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from inplace_ttt.cli.preview import preview
from inplace_ttt.errors import UserError
from inplace_ttt.hf.load import check_words, load, load_baseline
from inplace_ttt.shipped import SHIPPED

WORDS = ["".join(x) for x in itertools.product("abcd", repeat=5)][::17]


def tokenizer_of(mark, spoiled=False):
    """Byte-pair encoding of words of five letters, each built from the left; ``spoiled``: without the last merges."""
    merges = {}
    for word in WORDS:
        for end in range(1, 6):
            merges[(mark + word)[:end], word[end - 1]] = None
    listed = [(a, b) for a, b in merges if not (spoiled and len(a + b) == 6)]
    names = dict.fromkeys(["<unk>", mark, *"abcd", *(a + b for a, b in merges)])
    model = models.BPE({name: i for i, name in enumerate(names)}, listed, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", mark)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("mark", ["\u2581", "\u0120"])
def test_words_that_are_split_are_noticed(mark):
    check_words(tokenizer_of(mark), "right.gguf")
    with pytest.raises(UserError, match=r"converts the tokenizer of wrong.gguf wrongly: it splits '[abcd]{5}'"):
        check_words(tokenizer_of(mark, spoiled=True), "wrong.gguf")


def test_tokenizer_from_elsewhere(tmp_path):
    tokenizer_of("\u2581").save_pretrained(tmp_path)
    _, own = load(SHIPPED, "cpu")
    _, other = load(SHIPPED, "cpu", tokenizer=tmp_path)
    assert len(other) != len(own)
    assert other(" abcd").input_ids == tokenizer_of("\u2581")(" abcd").input_ids


def test_prefix_of_a_sentence_counts_as_a_space():
    tokenizer = tokenizer_of("\u2581")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    check_words(tokenizer, "prefixed.gguf")


def test_vocabularies_without_marked_words_pass():
    model = models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>")
    check_words(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>"), "plain.gguf")


@pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")
@pytest.mark.parametrize("rest", [b"", b"\xff" * 40, struct.pack("<IQQQ", 3, 0, 1, 9)])
def test_a_damaged_gguf_file_is_named(tmp_path, rest):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + rest)
    for read in (partial(load, objective="loss"), load_baseline):
        with pytest.raises(UserError, match=r"cut.gguf: missing or damaged"):
            read(tmp_path / "cut.gguf", "cpu")
    with pytest.raises(UserError, match=r"cut.gguf cannot be read"):
        preview(str(tmp_path / "cut.gguf"), {})
