"""What the demo says about names out of sight, checked by brute force."""

import re

import numpy as np
import pytest
from tiny_models import NAMES, WINDOW

from inplace_ttt.demo.names import LIKELY, attention_window, is_name, returning_names
from inplace_ttt.demo.text import Tokens, tokenize
from inplace_ttt.text_files import Source


@pytest.fixture
def read(tokenizer, tmp_path):
    def make(text: str) -> Tokens:
        return tokenize(Source(tmp_path / "t", text, len(text), True), tokenizer, 4, 10_000)

    return make


def everything(tokens: Tokens, window: int, most: int = 10_000):
    """All places: every token costs nothing with updates on and five nats with them off."""
    n = len(tokens.ids) - 1
    return returning_names(tokens, np.zeros(n), np.full(n, 5.0), window, 3, most)


def test_places_are_out_of_sight(read, tokenizer, words):
    """The tokens that attention sees do not spell the name; the place it was last seen does."""
    tokens = read(words)
    names = everything(tokens, WINDOW)
    assert names.count == names.found >= 50
    assert len(names.places) == len({p.name for p in names.places}) == len(NAMES)
    for place in names.places:
        first = place.position
        spelled = tokenizer.decode(tokens.ids[first : first + place.tokens])
        assert spelled.strip() == place.name
        assert place.name not in tokenizer.decode(tokens.ids[first - WINDOW : first])
        last = tokenizer.decode(tokens.ids[first - place.ago : first - place.ago + 2 * place.tokens])
        assert last.strip().startswith(place.name)
        between = tokenizer.decode(tokens.ids[first - place.ago + place.tokens : first])
        assert place.name not in between
        before = re.sub(r"\s+", " ", tokenizer.decode(tokens.ids[:first]))
        assert before.rstrip().endswith(place.context.lstrip("…").rstrip())


def test_count_by_brute_force(read, tokenizer, words):
    tokens = read(words)
    count = 0
    for first in range(1, len(tokens.ids)):
        if not tokens.text[slice(*tokens.spans[first])].strip():
            continue
        for name in NAMES:
            for end in range(first + 1, min(first + 20, len(tokens.ids)) + 1):
                here = tokens.text[tokens.spans[first][0] : tokens.spans[end - 1][1]]
                if here.strip() != name or tokens.text[tokens.spans[end - 1][1]].isalnum():
                    continue
                if name == "Moonfleet" and not tokens.text[: tokens.spans[first][0]].rstrip()[-1].isalnum():
                    continue  # its capital may be that of a sentence
                seen = tokens.text[: tokens.spans[first][0]]
                # An occurrence that only reaches into the window does not count either.
                start = max(first - WINDOW, 0)
                overlap = tokens.text[max(tokens.spans[start][0] - len(name) + 1, 0) : tokens.spans[first][0]]
                count += name in seen and name not in overlap
    assert everything(tokens, WINDOW).count == count


def test_boundary_of_the_window(read):
    """The query that predicts a token sees ``window`` tokens; one more and the name's last piece is out of sight."""
    text = "blockSize " + "it of a " * 9 + "blockSize then"
    tokens = read(text)
    place = everything(tokens, 1).places[0]
    end_of_first = place.position - place.ago + place.tokens - 1
    widest = place.position - end_of_first - 1
    assert everything(tokens, widest).count == 1
    assert everything(tokens, widest + 1).count == 0


def test_part_of_a_longer_name_is_in_sight(read):
    filler = "it of a " * 9
    assert everything(read(f"TarInfo {filler}TarInfo then"), WINDOW).count == 1
    assert everything(read(f"TarInfo {filler}xTarInfoList TarInfo then"), WINDOW).count == 0
    assert everything(read(f"other {filler}TarInfo then"), WINDOW).count == 0


def test_part_of_a_longer_name_was_not_the_name(read):
    """A name that only longer words held before has not been seen; its last own place counts, not a longer word's."""
    filler = "it of a " * 9
    for longer in ("xTarInfo", "TarInfoList", "_TarInfo", "TarInfo2", "2TarInfo"):
        assert everything(read(f"{longer} {filler}TarInfo then"), WINDOW).count == 0, longer
    text = f"TarInfo {filler}xTarInfo TarInfoList {filler}TarInfo then"
    tokens = read(text)
    (place,) = everything(tokens, WINDOW).places
    assert place.position - place.ago == 0


def test_capital_of_a_sentence_makes_no_name(read):
    filler = "it of a " * 9
    for before, count in (("to ", 1), ("then, ", 1), ("then\n", 1), ("end. ", 0), ("(", 0), ('"', 0)):
        assert everything(read(f"Moonfleet {filler}{before}Moonfleet then"), WINDOW).count == count, before


def test_probabilities_and_ranking(read, words):
    tokens = read(words)
    rng = np.random.default_rng(0)
    on, off = rng.exponential(2.0, len(tokens.ids) - 1), rng.exponential(3.0, len(tokens.ids) - 1)
    names = returning_names(tokens, on, off, WINDOW, 3, 4)
    assert 1 < len(names.places) <= 4
    assert names.found > 0
    assert names.lost > 0
    for place in names.places:
        spelled = slice(place.position - 1, place.position - 1 + place.tokens)
        assert place.on == pytest.approx(np.exp(-on[spelled].sum()))
        assert place.off == pytest.approx(np.exp(-off[spelled].sum()))
        assert place.gain == pytest.approx(np.log(place.on / place.off))
        assert place.on >= LIKELY > place.off
    gains = [p.gain for p in names.places]
    assert gains == sorted(gains, reverse=True)
    swapped = returning_names(tokens, off, on, WINDOW, 3, 4)
    assert (swapped.found, swapped.lost, swapped.mean_gain) == (
        names.lost,
        names.found,
        pytest.approx(-names.mean_gain),
    )


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("read_header", True),
        ("sha256", True),
        ("blockSize", True),
        ("_private", True),
        ("Moonfleet", True),
        ("There", False),  # the text has "there"
        ("there", False),
        ("None", False),
        ("ValueError", False),
        ("__init__", False),
        ("a_b", False),  # too short
    ],
)
def test_is_name(word, answer):
    assert is_name(word, {"there", "Moonfleet", word}) is answer


def test_attention_window():
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config

    assert attention_window(MistralConfig(sliding_window=256)) == 256
    assert attention_window(MistralConfig(sliding_window=None)) is None
    assert attention_window(LlamaConfig()) is None
    assert attention_window(Gemma2Config(sliding_window=128)) is None  # every second layer sees everything
    assert attention_window(Qwen2Config(sliding_window=64)) is None  # use_sliding_window is off
