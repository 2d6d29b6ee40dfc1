"""Every form of mask: a column for each token or each slot of the cache, prepared ones, documents, refusals."""

import pytest
import torch
from contract.families import C, adapted, logits, padded, plain, tokens
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

import inplace_ttt as ittt
from inplace_ttt.hf.cache import cache_name

SLOTS = 6 * C
FIRST, SECOND = 2 * C + 1, 2 * C + 2
TOTAL = FIRST + SECOND
IDS = tokens(1, TOTAL)
NUMBERS = torch.tensor([0] * FIRST + [1] * SECOND)
POSITIONS = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
objectives = pytest.mark.parametrize("objective", ["learned", "loss"])
kinds = pytest.mark.parametrize("kind", ["dynamic", "static"])
dtypes = pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=["bool", "float"])


def reader(objective, family="llama"):
    if objective == "learned":
        return adapted(family)
    return ittt.attach(plain(family), ittt.InPlaceTTTConfig(objective="loss", layers="0::2", chunk_size=C, clip=0.3))


def empty(model, kind):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=SLOTS)


def prepared(start, end, columns, dtype, real=None, numbers=None, window=SLOTS):
    """The mask [B, 1, end - start, columns] of tokens ``start`` .. ``end``; ``real`` and ``numbers`` of all slots."""
    row, column = torch.arange(start, end)[:, None], torch.arange(columns)
    allowed = ((column <= row) & (column > row - window))[None, None]
    if real is not None:
        allowed = allowed & real[:, None, None, :columns] & real[:, None, start:end, None]
    if numbers is not None:
        numbers = torch.nn.functional.pad(numbers, (0, SLOTS - len(numbers)), value=-1)
        allowed = allowed & (numbers[row] == numbers[column])
    if dtype == torch.bool:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


@torch.no_grad()
def read(model, cache, ids, mask, positions):
    """The logits of new tokens."""
    return model(ids, attention_mask=mask, position_ids=positions, **{cache_name(model): cache}).logits


@objectives
@kinds
@pytest.mark.parametrize("form", ["2-D", "bool", "float"])
def test_a_column_for_each_slot_of_the_cache(form, kind, objective):
    """A padded batch: a prompt, a second piece and single tokens are every row alone."""
    rows = [tokens(1, 3 * C + 1), tokens(1, 2 * C + 3, seed=1)]
    model, batch = reader(objective), padded(rows, "left")
    total = batch["input_ids"].shape[1]
    real = torch.nn.functional.pad(batch["attention_mask"].bool(), (0, SLOTS - total))
    cache, out = empty(model, kind), []
    for start, end in ((0, C + 3), (C + 3, 2 * C + 1), *((t, t + 1) for t in range(2 * C + 1, total))):
        columns = SLOTS if kind == "static" else end
        mask = (
            real.long()
            if form == "2-D"
            else prepared(start, end, columns, {"bool": torch.bool}.get(form, torch.float64), real)
        )
        out.append(read(model, cache, batch["input_ids"][:, start:end], mask, batch["position_ids"][:, start:end]))
    for b, row in enumerate(rows):
        found = torch.cat(out, 1)[b : b + 1, total - row.shape[1] :]
        assert_close(found, logits(model, row), atol=1e-6, rtol=0)


@objectives
@dtypes
@pytest.mark.parametrize("kind", ["none", "static"])
def test_block_diagonal_is_packing(kind, dtype, objective):
    """Documents end to end, in one call; with padding between and behind them as well."""
    model = reader(objective)
    alone = [logits(model, IDS[:, :FIRST]), logits(model, IDS[:, FIRST:])]
    columns = TOTAL if kind == "none" else SLOTS
    given = {"attention_mask": prepared(0, TOTAL, columns, dtype, numbers=NUMBERS), "position_ids": POSITIONS}
    if kind == "none":
        assert_close(logits(model, IDS, **given), torch.cat(alone, 1), atol=1e-6, rtol=0)
        gap = torch.zeros(1, 2, dtype=torch.int64)
        ids = torch.cat([IDS[:, :FIRST], gap, IDS[:, FIRST:], gap], 1)
        numbers = torch.cat([NUMBERS[:FIRST], gap[0], NUMBERS[FIRST:], gap[0]])
        real = torch.nn.functional.pad(ids != 0, (0, SLOTS - ids.shape[1]))
        positions = torch.cat([POSITIONS[:, :FIRST], gap, POSITIONS[:, FIRST:], gap], 1)
        mask = prepared(0, ids.shape[1], ids.shape[1], dtype, real, numbers)
        found = logits(model, ids, attention_mask=mask, position_ids=positions)[:, real[0, : ids.shape[1]]]
        assert_close(found, torch.cat(alone, 1), atol=1e-6, rtol=0)
    elif objective == "learned":
        assert_close(read(model, empty(model, kind), IDS, *given.values()), torch.cat(alone, 1), atol=1e-6, rtol=0)
    else:
        with pytest.raises(ittt.UserError, match="several documents cannot be read into a cache"):
            read(model, empty(model, kind), IDS, *given.values())


@kinds
@dtypes
def test_a_document_that_begins_inside_a_later_call(dtype, kind):
    model, cut = adapted("llama"), FIRST - 2
    cache = empty(model, kind)
    columns = [SLOTS, SLOTS] if kind == "static" else [cut, TOTAL]
    read(model, cache, IDS[:, :cut], prepared(0, cut, columns[0], dtype, numbers=NUMBERS), POSITIONS[:, :cut])
    mask = prepared(cut, TOTAL, columns[1], dtype, numbers=NUMBERS)
    found = read(model, cache, IDS[:, cut:], mask, POSITIONS[:, cut:])
    want = torch.cat([logits(model, IDS[:, :FIRST])[:, cut:], logits(model, IDS[:, FIRST:])], 1)
    assert_close(found, want, atol=1e-6, rtol=0)


@kinds
def test_windows_are_no_documents(kind):
    """A window given by hand, in one call and in pieces: as without fast weights, one document."""
    model, window = adapted("llama"), 6
    whole = logits(model, IDS, attention_mask=prepared(0, TOTAL, TOTAL, torch.bool, window=window))
    with ittt.updates_off(model):
        assert not torch.allclose(
            whole, logits(model, IDS, attention_mask=prepared(0, TOTAL, TOTAL, torch.bool, window=window))
        )
    cache, out = empty(model, kind), []
    for start, end in ((0, C + 1), (C + 1, 3 * C), *((t, t + 1) for t in range(3 * C, TOTAL))):
        mask = prepared(start, end, SLOTS if kind == "static" else end, torch.bool, window=window)
        out.append(read(model, cache, IDS[:, start:end], mask, torch.arange(start, end)[None]))
    assert_close(torch.cat(out, 1), whole, atol=1e-6, rtol=0)


def tree(start, end):
    """Two drafts of the token behind ``end - 2``, side by side."""
    mask = prepared(start, end, end, torch.bool)
    mask[..., -1, -2] = False
    return mask


def hidden(start, end):
    """Three tokens in the middle of the text, which nobody may see later."""
    row, column = torch.arange(start, end)[:, None], torch.arange(end)
    return prepared(start, end, end, torch.bool) & ~((row > 5) & (column > 2) & (column < 6))


def two_way(start, end):
    return torch.ones(1, 1, end - start, end, dtype=torch.bool)


@objectives
@pytest.mark.parametrize("form", [tree, hidden, two_way])
@pytest.mark.parametrize("past", [0, C + 2])
def test_other_shapes_are_refused(past, form, objective):
    """At the prompt and behind a cache; the cache can be used again."""
    model = reader(objective)
    cache = empty(model, "dynamic")
    if past:
        read(model, cache, IDS[:, :past], None, None)
    end = past + C if past else TOTAL
    with pytest.raises(NotImplementedError, match="neither causal nor that of documents"):
        read(model, cache, IDS[:, past:end], form(past, end), torch.arange(past, end)[None])
    found = read(model, cache, IDS[:, past:end], prepared(past, end, end, torch.bool), None)
    assert_close(found, logits(model, IDS)[:, past:end], atol=1e-6, rtol=0)


@objectives
def test_a_single_token_that_may_not_see_what_was_read(objective):
    model = reader(objective)
    cache = empty(model, "dynamic")
    read(model, cache, IDS[:, : C + 2], None, None)
    for form, say in ((hidden, "neither causal"), (alone, "behind another one that the cache holds")):
        with pytest.raises(NotImplementedError, match=say):
            read(model, cache, IDS[:, C + 2 : C + 3], form(C + 2, C + 3), torch.tensor([[C + 2]]))


def alone(start, end):
    return prepared(start, end, end, torch.bool) & (torch.arange(end) >= start)


@pytest.mark.parametrize(
    ("mask", "say"),
    [
        (torch.ones(1, 1, TOTAL, TOTAL, dtype=torch.int64), "int64"),
        (torch.ones(1, 1, 1, TOTAL, dtype=torch.bool), r"\(1, 1, 1, 19\)"),
    ],
    ids=["numbers", "one row for all tokens"],
)
def test_prepared_masks_that_cannot_be_read(mask, say):
    with pytest.raises(NotImplementedError, match=say):
        logits(adapted("llama"), IDS, attention_mask=mask)


@objectives
def test_document_numbers_in_a_2_d_mask_are_refused(objective):
    """Transformers takes them for ones, so attention would see across documents."""
    with pytest.raises(ittt.UserError, match=r"numbers other than 0 and 1.*position_ids that begin at 0"):
        logits(reader(objective), IDS, attention_mask=NUMBERS[None] + 1)
