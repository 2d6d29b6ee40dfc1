"""A byte-level BPE tokenizer: trained on the training split, lossless, loaded with ``AutoTokenizer``."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.train import SMALLEST_VOCABULARY
from inplace_ttt.train.sources import Document, hash_of

END_OF_TEXT = "<|endoftext|>"

_BATCH_CHARACTERS = 1 << 24  # bounds the memory that the encodings take (about 100 bytes a token)
_SAMPLE_CHARACTERS = 1 << 18  # of one document, while the tokenizer trains


def train_tokenizer(
    domains: Sequence[Iterable[Document]], vocab_size: int, max_bytes: int = 32_000_000
) -> PreTrainedTokenizerFast:
    """Train on about ``max_bytes`` bytes, taken in turn from every domain; iterates twice over each of them.

    Every digit is a token. The only special token is BOS, EOS and padding. The same documents give the same
    tokenizer on every machine. Raises UserError when the vocabulary is too small or the text too short to fill it.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size} is too small: byte-level BPE needs {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(domains, max_bytes), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the training text yields only {tokenizer.get_vocab_size()} tokens, not vocab_size {vocab_size}: "
            "give more text or a smaller vocabulary"
        )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or the hub. Raises UserError when there is none or it is not a fast one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer at {path}: {in_one_line(error)}") from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer at {path} cannot be used: training needs a fast one with an end-of-text token")
    return tokenizer


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document], characters: int | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each document's id and its tokens, the last one end-of-text: uint16 [n], uint32 for large vocabularies.

    Special tokens that a text spells out are encoded as ordinary text. About ``characters`` of text are read ahead (16
    million), and encoded on all cores.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy: the user's keeps its settings
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    end = [tokenizer.eos_token_id]
    for batch in _batches(documents, _BATCH_CHARACTERS if characters is None else characters):
        encoded = backend.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        for document, found in zip(batch, encoded, strict=True):
            yield document.id, np.fromiter(chain(found.ids, end), dtype, len(found) + 1)


def _sample(domains: Sequence[Iterable[Document]], max_bytes: int) -> Iterator[str]:
    """Yield documents in the order of their hash, one of each domain in turn, the beginning of each.

    Reads every domain twice: for the order and the sizes, then for the texts that are wanted.
    """
    known = [
        (turn, domain, i, size)
        for domain, documents in enumerate(domains)
        for turn, (_, i, size) in enumerate(
            sorted((hash_of(d), i, len(d.text[:_SAMPLE_CHARACTERS].encode())) for i, d in enumerate(documents))
        )
    ]
    wanted: dict[tuple[int, int], str] = {}
    for _, domain, i, size in sorted(known):
        if max_bytes > 0:
            wanted[domain, i] = ""
            max_bytes -= size
    for domain, documents in enumerate(domains):
        last = max((i for other, i in wanted if other == domain), default=-1)
        for i, document in enumerate(documents):
            if (domain, i) in wanted:
                wanted[domain, i] = document.text[:_SAMPLE_CHARACTERS]
            if i >= last:
                break
    yield from wanted.values()


def _batches(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
