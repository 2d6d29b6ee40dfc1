"""Text in pieces: the ids of the whole text however it was cut, the characters when they are complete."""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from locations import SHARED
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from inplace_ttt import DEFAULT_MODEL
from inplace_ttt.errors import UserError
from inplace_ttt.session import text as module
from inplace_ttt.session.text import StreamDecoder, StreamEncoder

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_FROM_THE_RIGHT = LLAMA3.replace(r"\p{N}{1,3}|", r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|")
OVER_A_GAP = r"\p{L}+(?:\s+[!?<])?|\s+|[^\s\p{L}]+"
BEHIND = r"(?<=[aeo ].{9})[a-z]+|\s+|\S"
FROM_THE_START = r"\A(?m:.{50})|\s+|\S+"
CJK = r"[\^\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"

SPECIAL = {"bos": "<s>", "eos": "</s>", "pad": "<|endoftext|>"}
PIECES = [
    *("the", "hello", "World", "don't", "WE'LL", "they're", "I'd've", "x", "er", "internationalisation", "HTTPServer"),
    *(" ", " ", " ", " ", "  ", "   ", " " * 40, "\t", "\n", "\n\n", "\r\n", "\r", " \n", "\u00a0", "\u3000", "\u2028"),
    *("1", "12", "123", "1234567", "1" * 16, "3.14", "२३", "½"),
    *("\uff0c", "。", "你好世界", "東京", "カタカナ", "か\u3099", "한국어", "\u1112\u1161\u11ab", "สวัสดี", "नमस्ते"),
    *(
        "👩\u200d👩\u200d👧",
        "🏳\ufe0f\u200d🌈",
        "🙂",
        "e\u0301",
        "\u0301",
        "é",
        "o\u0323\u0302",
        "\u212b",
        "ﬁ",
        "ß",
        "İ",
    ),
    *("def f(x):\n        return x\n", "  // !!", "==", "--", "'", "''", "'r", "'l", '"', "...", "/", "_", "<", ">"),
    *("<s>", "</s>", "<|im_start|>", "<|endoftext|>", "<unk>", "<tool>", "<to", "ol>", "\ufffd", "\x00", "▁", "a▁b"),
    *("one two three", " four five six"),
]
MARKS = "\u0345" * 20 + "\u0323" * 20  # normalisation turns their order round
NASTY = [
    "so the word   ? and word  ! or not, and  then\r\n\r\n   \n  it goes on",
    "a b c " + "1" * 16 + " 12345678 x y 1,234,567.89 and so on",
    "x y z" + " " * 60 + "hello" + " " * 30 + "hello world and so on",
    "so it is on it so is so it is on on it is so it is so on so it is it on it is so it is on so it is on.",
    "it is one two three four five six. one two three four. five six seven",
    f"a b c e{MARKS} a e{MARKS[10:]} a b c d e o\u0323\u0302e\u0301 \u0301 x",
    "don't they'RE 'll x'r e we've 'VE don''t I'd've ABCdefGHI'll",
]


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Few different pieces, often: what stands side by side matters."""
    pieces = draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), min_size=1, max_size=8))
    generator = random.Random(draw(st.integers(0, 1 << 16)))
    return "".join(generator.choices([*pieces, " "], k=draw(st.integers(0, 100))))


TEXT = texts()


def _corpus() -> list[str]:
    generator = random.Random(1)
    common = [" ".join(generator.choices(["so", "it", "is", "on"], k=12)) for _ in range(150)] + ["word   ?"] * 50
    return common + ["".join(generator.choice(PIECES[:60]) for _ in range(40)) for _ in range(150)]


def _byte_level(regex: str | None = None, *before: Any, normalizer: Any = None, space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=regex is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, *splits, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|endoftext|>", "<|im_start|>"]
    tokenizer.train_from_iterator(
        _corpus(),
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]),
        ]
    )
    return tokenizer


def _sentence_piece(normalizer: Any, train: Any, use: Any, fallback: bool = True) -> Tokenizer:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if fallback)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if train is not None:
        tokenizer.pre_tokenizer = train
    # Rare characters stay out of the alphabet, for byte fallback and unknown tokens.
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special[:3], limit_alphabet=70, initial_alphabet=["▁"], show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if fallback:
        tokenizer = _with_bytes(tokenizer)
    tokenizer.pre_tokenizer = use
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    return Tokenizer.from_str(json.dumps(spec))


def _llama(train: Any = None) -> Tokenizer:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sentence_piece(normalizer, train, None)


def _gemma() -> Tokenizer:
    tokenizer = _sentence_piece(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Metaspace(), pre_tokenizers.Split(" ", "merged_with_previous")
    )
    tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (2, 3)] + [AddedToken("<tool>")])
    return tokenizer


def _added() -> Tokenizer:
    tokenizer = _byte_level(QWEN2, normalizer=normalizers.NFC())
    tokenizer.add_tokens(
        [AddedToken("<tool>"), AddedToken("</s>x", rstrip=True), AddedToken("one two three four five six")]
    )
    return tokenizer


def _added_sentence_piece(make: Callable[[], Tokenizer]) -> Tokenizer:
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("hello", lstrip=True), AddedToken("x y")])
    return tokenizer


def _bert() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        _corpus(), trainers.WordPieceTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False)
    )
    return tokenizer


def _unigram(split: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    return tokenizer


def _single_word() -> Tokenizer:
    tokenizer = _byte_level()
    tokenizer.add_tokens([AddedToken("er", single_word=True)])
    return tokenizer


def _deepseek() -> Tokenizer:
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    return _byte_level(QWEN2, digits, pre_tokenizers.Split(Regex(CJK), "isolated"))


METASPACE = pre_tokenizers.Metaspace
BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _byte_level(),
    "gpt2 with a space": lambda: _byte_level(space=True),
    "qwen2": lambda: _byte_level(QWEN2, normalizer=normalizers.NFC()),
    "nfkd": lambda: _byte_level(QWEN2, normalizer=normalizers.NFKD()),
    "llama3": lambda: _byte_level(LLAMA3),
    "o200k": lambda: _byte_level(O200K),
    "digits from the right": lambda: _byte_level(DIGITS_FROM_THE_RIGHT),
    "looks over a gap": lambda: _byte_level(OVER_A_GAP),
    "looks behind": lambda: _byte_level(BEHIND),
    "every character": lambda: _byte_level(r"\s|\S", normalizer=normalizers.NFC()),
    "deepseek": _deepseek,
    "added tokens": _added,
    "llama": lambda: _llama(METASPACE()),
    "llama, tokens of several words": _llama,
    "no bytes": lambda: _sentence_piece(normalizers.NFKC(), METASPACE(), METASPACE(split=False), fallback=False),
    "metaspace first": lambda: _sentence_piece(None, METASPACE(), METASPACE(prepend_scheme="first")),
    "metaspace always": lambda: _sentence_piece(None, METASPACE(), METASPACE(prepend_scheme="always")),
    "gemma": _gemma,
    "llama, added tokens": lambda: _added_sentence_piece(_llama),
    "metaspace, added tokens": lambda: _added_sentence_piece(BACKENDS["metaspace first"]),
    "bert": _bert,
    "unigram": lambda: _unigram(True),
}
HELD: dict[str, Callable[[], Tokenizer]] = {
    "unigram over the text": lambda: _unigram(False),
    "strip": lambda: _byte_level(normalizer=normalizers.Strip()),
    "long replacement": lambda: _byte_level(normalizer=normalizers.Replace(Regex(" {2,}"), " ")),
    "counts from the start": lambda: _byte_level(FROM_THE_START),
    "scripts": lambda: _byte_level(None, pre_tokenizers.UnicodeScripts()),
    "single word": _single_word,
}
STORED: dict[str, Any] = {"shipped": DEFAULT_MODEL, "stories260K": SHARED / "models" / "stories260K"}
BYTE_LEVEL = ["gpt2", "qwen2", "llama3", "o200k", "shipped"]


@cache
def load(name: str) -> Any:
    if name in STORED:
        if name != "shipped" and not STORED[name].is_dir():
            pytest.skip(f"no test data at {STORED[name]}")
        return AutoTokenizer.from_pretrained(STORED[name])
    backend = (BACKENDS | HELD)[name]()
    special = {f"{kind}_token": token for kind, token in SPECIAL.items() if backend.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def whole(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def in_pieces(text: str, sizes: Iterable[int]) -> Iterator[str]:
    """The text cut into pieces of these sizes, again and again."""
    begin = 0
    for size in itertools.cycle(sizes):
        if begin >= len(text):
            return
        yield text[begin : begin + size]
        begin += size


def pushed(encoder: StreamEncoder, pieces: Iterable[str]) -> list[int]:
    return [id for piece in pieces for id in encoder.push(piece)]


def prose(characters: int, seed: int = 0) -> str:
    generator = random.Random(seed)
    words = [*PIECES[:10], "12,345", "naïve", "你好\uff0c", "it's", "(see", "above)", "🙂", "a\n", "b.\n\n"]
    return " ".join(generator.choice(words) for _ in range(characters))[:characters]


@pytest.mark.parametrize("name", [*BACKENDS, *HELD, *STORED])
@given(text=TEXT, sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), small=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_same_ids_however_cut(name: str, text: str, sizes: list[int], small: bool) -> None:
    tokenizer = load(name)
    with pytest.MonkeyPatch.context() as patch:  # as if the text was long: many cuts in a short one
        patch.setattr(module, "_STEP", 1)
        patch.setattr(module, "_WINDOW", 16 if small else 1 << 15)
        encoder = StreamEncoder(tokenizer)
        for _ in range(2):  # a flush begins a new text
            ids = pushed(encoder, in_pieces(text, sizes))
            assert ids + encoder.flush() == whole(tokenizer, text)
            assert encoder.held == ""


@pytest.mark.parametrize("name", [*BACKENDS, *STORED])
def test_every_cut_of_nasty_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP", 1)
    tokenizer = load(name)
    fresh = StreamEncoder(tokenizer)
    for text in NASTY:
        ids = whole(tokenizer, text)
        for cut in range(1, len(text)):
            encoder = fresh.fork()
            assert encoder.push(text[:cut]) + encoder.push(text[cut:]) + encoder.flush() == ids, text[:cut]


@pytest.mark.parametrize("name", [*BACKENDS, *STORED])
@pytest.mark.parametrize("sizes", [[7, 300, 4096], [20_000]], ids=str)
def test_long_text_is_settled_on_the_way(name: str, sizes: list[int]) -> None:
    tokenizer, text = load(name), prose(20_000)
    encoder = StreamEncoder(tokenizer)
    ids = pushed(encoder, in_pieces(text, sizes))
    assert len(encoder.held) < 700
    assert text.endswith(encoder.held)
    assert ids + encoder.flush() == whole(tokenizer, text)


@pytest.mark.parametrize("name", HELD)
def test_everything_is_held_where_far_text_counts(name: str) -> None:
    encoder, text = StreamEncoder(load(name)), prose(5000)
    assert pushed(encoder, in_pieces(text, [500])) == []
    assert encoder.held == text


@pytest.mark.parametrize("name", ["qwen2", "llama", "metaspace always", "shipped"])
@given(text=TEXT, more=TEXT)
@settings(max_examples=25, deadline=None)
def test_state_and_fork_go_on_alike(name: str, text: str, more: str) -> None:
    tokenizer = load(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STEP", 4)
        encoder = StreamEncoder(tokenizer)
        before = pushed(encoder, in_pieces(text, [5]))
        state = json.loads(json.dumps(encoder.state()))
        restored, fork = StreamEncoder.restore(tokenizer, state), encoder.fork()
        assert pushed(fork, ["something else, said to the fork alone. " * 3]) + fork.flush()
        for one in (encoder, restored, StreamEncoder.restore(tokenizer, state).fork()):
            assert one.state() == state
            assert one.prefix == encoder.prefix
            assert before + pushed(one, in_pieces(more, [3])) + one.flush() == whole(tokenizer, text + more)


@pytest.mark.parametrize("name", ["qwen2", "llama", "shipped"])
@pytest.mark.parametrize(
    ("text", "size", "most"),
    [(prose(100_000), 500, 1.5), (prose(40_000), 3, 2.0), ("a" * 80_000, 50, 4.0), (" " * 80_000, 50, 4.0)],
    ids=["prose", "small pieces", "one word", "spaces"],
)
def test_cost(name: str, text: str, size: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encode, seen = load(name), module._Splitter.encode, [0]

    def counted(splitter: Any, text: str) -> Any:
        seen[0] += len(text)
        return encode(splitter, text)

    monkeypatch.setattr(module._Splitter, "encode", counted)
    encoder = StreamEncoder(tokenizer)
    ids = pushed(encoder, in_pieces(text, [size])) + encoder.flush()
    assert seen[0] < most * len(text)
    assert ids == whole(tokenizer, text)


def test_prefix_is_what_comes_before_a_text() -> None:
    tokenizer = load("gpt2")
    assert tokenizer("a b")["input_ids"] == [0, *whole(tokenizer, "a b"), 1]
    assert StreamEncoder(tokenizer).prefix == [0]
    assert StreamEncoder(load("shipped")).prefix == []
    assert StreamEncoder(load("stories260K")).prefix == [1]


def test_special_tokens_spelt_out_are_text() -> None:
    tokenizer = load("qwen2")
    encoder = StreamEncoder(tokenizer)
    with pytest.warns(UserWarning, match="special token"):
        ids = encoder.push("<|im_start|>user <s>") + encoder.flush()
    assert not set(ids) & {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<s>")}
    assert tokenizer("<s>", add_special_tokens=False)["input_ids"] == [0], "the caller's tokenizer is unchanged"


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("cut", [0, 7, 12, 30])
def test_a_special_token_spelt_out_is_said_once(cut: int, forks: bool, recwarn: pytest.WarningsRecorder) -> None:
    """However the text is cut."""
    text = "hello <|im_start|>user\nhi <|im_end|>"
    encoder = StreamEncoder(load("qwen2"))
    for piece in (text[:cut], text[cut:], text):
        encoder = encoder.fork() if forks else encoder
        encoder.push(piece)
    (said,) = [str(warning.message) for warning in recwarn.list]
    assert re.search(r"holds '<\|im_(start|end)\|>', a special token.*apply_chat_template", said)


def test_text_without_special_tokens_warns_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    encoder = StreamEncoder(load("qwen2"))
    for piece in ("<|im_", "st", "op|> <im_start> ", "<|im_start|", " >"):
        encoder.push(piece)
    assert not recwarn.list


def test_tokens_added_later_are_known_to_the_next_encoder() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level())
    before = StreamEncoder(tokenizer)
    tokenizer.add_tokens(["hello world"])
    for encoder, same in ((before, False), (StreamEncoder(tokenizer), True)):
        ids = encoder.push("hello world") + encoder.flush()
        assert (ids == whole(tokenizer, "hello world")) is same


def test_errors() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast tokenizer"):
        StreamEncoder(Slow())
    encoder = StreamEncoder(load("gpt2"))
    encoder.push("kept")
    with pytest.raises(UserError, match="character 2 of the text is half a surrogate pair"):
        encoder.push("ab\ud83d")
    assert encoder.held == "kept"


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_decoder_gives_the_text_of_any_ids(name: str, data: st.DataObject) -> None:
    tokenizer = load(name)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1) | st.integers(0, 260), max_size=120))
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids)) + decoder.flush() == decode(tokenizer, ids)
    assert decoder.flush() == ""


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama", "gemma", "metaspace always", "stories260K", "bert"])
@given(text=TEXT, start=st.integers(0, 40))
@example(text="a " + 11 * "\ufffd", start=0)
@settings(max_examples=30, deadline=None)
def test_decoder_gives_real_text(name: str, text: str, start: int) -> None:
    tokenizer = load(name)
    ids = whole(tokenizer, text)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(id) for id in ids]
    assert "".join(pieces) + decoder.flush() == decode(tokenizer, ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    prompt = ids[:start]
    if not (said := decode(tokenizer, prompt)).endswith("\ufffd"):
        decoder = StreamDecoder(tokenizer, prompt)
        assert said + "".join(map(decoder.push, ids[start:])) + decoder.flush() == decode(tokenizer, ids)


def test_decoder_shows_characters_at_once_and_skips_special_tokens() -> None:
    tokenizer = load("stories260K")
    prompt, ids = (
        whole(tokenizer, "Once upon"),
        whole(tokenizer, "Once upon a 🙂")[len(whole(tokenizer, "Once upon")) :],
    )
    decoder = StreamDecoder(tokenizer, [tokenizer.bos_token_id, *prompt])
    pieces = [decoder.push(id) for id in [ids[0], tokenizer.eos_token_id, *ids[1:]]]
    assert pieces == [" a", "", " ", "", "", "", "🙂"]


def test_decoder_survives_bytes_that_are_no_character() -> None:
    tokenizer = load("stories260K")
    byte = tokenizer.convert_tokens_to_ids
    decoder = StreamDecoder(tokenizer)
    garbage = [byte("<0x29>"), byte("<0xFF>"), byte("<0xE2>")] * 100
    shown = "".join(map(decoder.push, garbage))
    assert shown.count("\ufffd") > 100, "nothing waits for ever"
    assert "".join(map(decoder.push, whole(tokenizer, "well"))).endswith(" well")


def test_decoder_gives_an_unfinished_character_at_the_end() -> None:
    tokenizer = load("gpt2")
    ids = whole(tokenizer, "x \U0001f9ff")
    decoder = StreamDecoder(tokenizer)
    assert "".join(map(decoder.push, ids[:-1])) == "x "
    assert decoder.flush() == "\ufffd"


def test_decoder_finds_the_character_after_lost_bytes() -> None:
    tokenizer = load("gpt2")
    (first, *rest) = whole(tokenizer, "\U0001f9ff")
    for lost in range(1, 70):
        ids = [first] * lost + [first, *rest]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) == decode(tokenizer, ids) == "\ufffd" * lost + "\U0001f9ff"


@pytest.mark.parametrize("name", ["gpt2", "llama", "stories260K"])
def test_decoder_after_a_prompt_cut_anywhere(name: str) -> None:
    tokenizer = load(name)
    ids = whole(tokenizer, "\U0001f9ff" * 9 + " the end")
    for cut, known in itertools.product(range(4, len(ids)), (8, 100)):
        decoder = StreamDecoder(tokenizer, ids[max(cut - known, 0) : cut])
        text = "".join(map(decoder.push, ids[cut:])) + decoder.flush()
        complete = max(n for n in range(cut + 1) if not decode(tokenizer, ids[:n]).endswith("\ufffd"))
        assert decode(tokenizer, ids[:complete]) + text == decode(tokenizer, ids)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
