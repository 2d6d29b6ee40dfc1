"""A toy task with a scratchpad: "3+8+5=" is answered by "3,11,16;16$", and only the final answer is rewarded."""

import random
from collections.abc import Sequence
from typing import Any

END = "$"
ALPHABET = "_" + END + "0123456789+=,;"
"""Every character is a token, its id the place here. "_" pads."""
PAD_ID, END_ID = 0, 1
FEWEST, MOST = 3, 8
"""Terms of a problem, each from 1 to 9."""
LONGEST_PROMPT, LONGEST_ANSWER = 2 * MOST, 3 * MOST + 3


def make_prompt(generator: random.Random, most: int = MOST) -> str:
    """Return a problem with three to ``most`` terms, such as "3+8+5="."""
    terms = generator.randint(FEWEST, most)
    return "+".join(str(generator.randint(1, 9)) for _ in range(terms)) + "="


def solve(prompt: str) -> str:
    """Return the answer with its scratchpad, such as "3,11,16;16$"."""
    sums = [0]
    for term in prompt.rstrip("=").split("+"):
        sums.append(sums[-1] + int(term))
    return ",".join(map(str, sums[1:])) + f";{sums[-1]}{END}"


def reward(prompt: str, completion: str) -> float:
    """Return 1.0 when the completion ends and what follows its last ";" is the sum, else 0.0. The rest is free."""
    return float(completion.endswith(";" + solve(prompt).split(";")[1]))


def encode(text: str) -> list[int]:
    """Return one id per character."""
    return [ALPHABET.index(c) for c in text]


def decode(ids: Sequence[int]) -> str:
    """Return the text up to and including the first end."""
    text = "".join(ALPHABET[i] for i in ids)
    return text.split(END)[0] + END if END in text else text.rstrip(ALPHABET[PAD_ID])


def make_tokenizer() -> Any:
    """Return a transformers tokenizer that agrees with ``encode``, for trainers that want one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token=ALPHABET[PAD_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=ALPHABET[PAD_ID], eos_token=END, padding_side="left"
    )
