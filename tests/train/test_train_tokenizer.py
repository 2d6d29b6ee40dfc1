"""The trained tokenizer: lossless, the same every time, loaded by AutoTokenizer."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inplace_ttt.errors import UserError
from inplace_ttt.train.sources import Document, read_source
from inplace_ttt.train.tokenizer import END_OF_TEXT, encode_documents, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def documents(corpus: Path) -> list[Document]:
    return list(read_source(f"jsonl:{corpus}/train.jsonl"))


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Knows runs of white space as tokens of their own."""
    code = Document("code", "def f():\n        a\n\n\n    b\n\t\tc  \n\n" * 4000)
    return train_tokenizer([documents, [code]], 320)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_round_trip_of_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ((_, ids),) = encode_documents(tokenizer, [Document("", text)])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1].tolist()) == text


def test_special_token_spelt_out_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ((_, ids),) = encode_documents(tokenizer, [Document("", f"a {END_OF_TEXT} b")])
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert tokenizer.decode(ids[:-1].tolist()) == f"a {END_OF_TEXT} b"
    assert tokenizer(END_OF_TEXT)["input_ids"] == [tokenizer.eos_token_id], "the caller's tokenizer is unchanged"


def test_training_is_repeatable_and_saved_whole(
    tokenizer: PreTrainedTokenizerFast, documents: list[Document], tmp_path: Path
) -> None:
    first, again = (train_tokenizer([documents], 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == again
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = documents[0].text
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert {loaded.bos_token, loaded.eos_token, loaded.pad_token} == {END_OF_TEXT}
    assert len(loaded) == 320
    assert len(loaded("kane 4711")["input_ids"]) >= 5, "digits stand alone"


def test_ids_are_compact(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> None:
    ((name, ids),) = encode_documents(tokenizer, documents[:1])
    assert name == documents[0].id
    assert ids.dtype == np.uint16
    assert len(ids) < len(documents[0].text.encode()) / 2


def test_every_domain_is_looked_at() -> None:
    """A long first domain does not use up the budget."""
    first = [Document(str(i), f"common words here {i}\n" * 5000) for i in range(10)]
    second = [Document("z", "zyzzyva\n" * 2000)]
    tokenizer = train_tokenizer([first, second], 275, max_bytes=120_000)
    assert any("zy" in token for token in tokenizer.get_vocab())


def test_mistakes(documents: list[Document], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too small"):
        train_tokenizer([documents], 100)
    with pytest.raises(UserError, match="only 259 tokens"):
        train_tokenizer([[Document("a", "aaaa")]], 1000)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
