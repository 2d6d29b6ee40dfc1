"""From logits to tokens as transformers does it; and where a text stops, however it is cut."""

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from session.models import ids_of, tiny

from inplace_ttt import Session, UserError
from inplace_ttt.session.sampling import Sampler, Sampling, StopText

LETTERS = st.text("ab\n", max_size=14)


def first_stop(text: str, stops: list[str]) -> str | None:
    """The text before the stop string that is complete first, the longest of several; None where there is none."""
    for end in range(len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return None


@given(LETTERS, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 14), max_size=5))
@example("xabcd", ["abcd", "bc"], [])
@example("aab", ["ab"], [2])
def test_stops_at_the_same_place_however_the_text_is_cut(text, stops, cuts):
    expected, stop, shown = first_stop(text, stops), StopText(stops), ""
    for start, end in pairwise(sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})):
        piece = stop.push(text[start:end])
        assert text.startswith(shown + piece)
        shown += piece
        if stop.found:
            break
        assert len(text[:end]) - len(shown) < max([1, *map(len, stops)])  # no more is held back than may be needed
    assert stop.found == (expected is not None)
    assert shown + ("" if stop.found else stop.flush()) == (text if expected is None else expected)


def test_one_stop_string_or_several():
    assert StopText("ab").stops == ("ab",)
    with pytest.raises(UserError, match="empty"):
        StopText(["a", ""])


OPTIONS = [
    {},
    {"repetition_penalty": 1.7},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 7, "repetition_penalty": 1.3},
    {"temperature": 2.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.5, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scores_are_those_of_transformers(options):
    """``generate`` gives the scores that it draws from."""
    model, ids = tiny("llama"), ids_of("It was the whale, the white whale, and it was")
    sampled = {"do_sample": True, "top_k": 0} if options.get("temperature") else {"do_sample": False}
    theirs = model.generate(
        torch.tensor([ids]), max_new_tokens=1, output_scores=True, output_logits=True, return_dict_in_generate=True,
        **(sampled | options),
    )  # fmt: skip
    mine = Sampling(**options).processors()(torch.tensor([ids]), theirs.logits[0].float())
    torch.testing.assert_close(mine, theirs.scores[0], check_dtype=False)
    if not options.get("temperature"):
        assert Sampler(Sampling(**options))(ids, theirs.logits[0][0]) == int(theirs.sequences[0, -1])


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_text_is_that_of_generate(penalty):
    model, ids = tiny("llama"), ids_of("It was the whale, the white whale, and it was")
    expected = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, repetition_penalty=penalty)
    s = Session(model, decay=0)
    assert s.generate_ids(ids, max_new_tokens=20, repetition_penalty=penalty) == expected[0, len(ids) :].tolist()


def test_draws_follow_the_distribution_and_the_seed():
    logits = torch.tensor([0.0, 1.0, 2.0, -1e9])
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    drawn = [sampler([], logits) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(0), rtol=0, atol=0.03)
    again = Sampler(Sampling(temperature=1.0, seed=0))
    assert [again([], logits) for _ in range(50)] == drawn[:50]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"temperature": None},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"seed": 0.5},
        {"seed": 2**70},
    ],
    ids=str,
)
def test_refused(wrong):
    with pytest.raises(UserError):
        Sampling(**wrong)


@pytest.mark.parametrize("wrong", [None, 5, [1], [""]], ids=str)
def test_stops_that_are_no_strings(wrong):
    with pytest.raises(UserError, match="stop"):
        StopText(wrong)


def test_nothing_read_yet_is_no_reason_to_fail():
    assert Sampler(Sampling(repetition_penalty=2.0))([], torch.tensor([0.0, 3.0])) == 1


def test_updates_that_ran_away():
    with pytest.raises(UserError, match="ran away"):
        Sampler(Sampling())([1], torch.tensor([0.0, float("nan")]))
