"""Packed rows: every token once an epoch, document boundaries, repeatable order, new cuts every epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from inplace_ttt.errors import UserError
from inplace_ttt.train.packing import (
    IGNORED,
    Layout,
    PackedRows,
    TokenStore,
    first_rows,
    plan_rows,
    row_tensors,
    updates_seen,
)

PAD = 0
T = 16


def store_of(lengths: list[int]) -> TokenStore:
    """Every token has a number of its own, from 1 on."""
    ids = np.arange(1, sum(lengths) + 1, dtype=np.uint32)
    cuts = np.cumsum(lengths)[:-1]
    return TokenStore.build((str(i), part) for i, part in enumerate(np.split(ids, cuts)))


lengths_ = st.lists(st.integers(1, 100), max_size=20).map(lambda lengths: [*lengths, 2])


@given(lengths_, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_an_epoch_reads_every_token_once(lengths: list[int], seed: int, epoch: int) -> None:
    store = store_of(lengths)
    rows, padding = plan_rows(store.offsets, Layout(T, seed), epoch)
    tensors = [row_tensors(store, row, Layout(T, pad_id=PAD)) for row in rows]
    seen = torch.cat([row["input_ids"] for row in tensors])
    assert int((seen == PAD).sum()) == padding
    seen = seen[seen != PAD].tolist()
    assert len(set(seen)) == len(seen)
    # Single tokens predict nothing and are dropped: at most the two ends of every document.
    assert len(seen) >= sum(lengths) - 2 * len(lengths)


@given(lengths_, st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_nothing_crosses_a_boundary(lengths: list[int], seed: int) -> None:
    store = store_of(lengths)
    for row in plan_rows(store.offsets, Layout(T, seed))[0]:
        tensors = row_tensors(store, row, Layout(T, pad_id=PAD))
        ids, positions, labels = (tensors[name] for name in ("input_ids", "position_ids", "labels"))
        starts = torch.cat([torch.tensor([True]), positions.diff() != 1])
        assert (positions[starts] == 0).all()
        assert (labels[starts] == IGNORED).all(), "nothing predicts a document's first token"
        inside = ~starts & (ids != PAD)
        assert (labels[inside] == ids[inside]).all()
        assert (ids[inside] == ids[torch.where(inside)[0] - 1] + 1).all(), "a document's tokens follow each other"
        assert (labels[ids == PAD] == IGNORED).all()
        documents = find_packed_sequence_indices(positions[None])
        count = 1 if documents is None else int(documents.max()) + 1
        assert count == len(row) + bool((ids == PAD).any()), "transformers sees the same documents"


@given(lengths_, st.integers(0, 3), st.sampled_from([(16, 4), (16, 16), (18, 4)]), st.sampled_from([1, 4]))
@settings(max_examples=150, deadline=None)
def test_long_documents_are_cut_at_chunk_boundaries(
    lengths: list[int], seed: int, sizes: tuple[int, int], align: int
) -> None:
    """Every piece starts a chunk of its document, and only a document's last piece ends inside one."""
    length, chunk = sizes
    store = store_of(lengths)
    rows, padding = plan_rows(store.offsets, Layout(length, seed, align=align, cut=chunk))
    ends = store.offsets[1:]
    for piece in (piece for row in rows for piece in row):
        document = int(np.searchsorted(ends, piece.start, side="right"))
        before = piece.start - int(store.offsets[document])
        assert before % chunk == 0
        assert piece.length % chunk == 0 or piece.start + piece.length == ends[document]
    assert all(sum(-(-piece.length // align) * align for piece in row[:-1]) + row[-1].length <= length for row in rows)
    taken = sum(piece.length for row in rows for piece in row)
    assert taken + padding == len(rows) * length
    assert taken >= sum(lengths) - len(lengths), "a single last token predicts nothing"
    starts = [int(row["input_ids"][0]) - 1 for row in first_rows(store, 50, Layout(length, pad_id=PAD, cut=chunk))]
    assert all((at - int(store.offsets[np.searchsorted(ends, at, side="right")])) % chunk == 0 for at in starts)


def test_cuts_change_from_epoch_to_epoch_and_stay_on_the_grid() -> None:
    offsets = store_of([110]).offsets  # six rows and 14 tokens: the first cut is at 0, 4, 8 or 12
    plans = [plan_rows(offsets, Layout(T, cut=4), epoch)[0] for epoch in range(20)]
    starts = [{piece.start for row in plan for piece in row} for plan in plans]
    assert {min(found - {0}) for found in starts} == {4, 8, 12, 16}


def test_a_document_that_fits_a_row_is_not_cut() -> None:
    """Even where a row is no multiple of a chunk."""
    rows, _ = plan_rows(store_of([18, 17, 16]).offsets, Layout(18, cut=4))
    assert sorted(piece.length for row in rows for piece in row) == [16, 17, 18]


def test_most_rows_are_whole_and_little_is_padded() -> None:
    lengths = np.random.default_rng(0).integers(1000, 40_000, 200).tolist()
    rows, padding = plan_rows(np.cumsum([0, *lengths]), Layout(4096))
    assert sum(len(row) == 1 for row in rows) >= sum(length // 4096 for length in lengths)
    assert padding / (len(rows) * 4096) < 0.01


def test_order_depends_on_seed_and_epoch_only() -> None:
    offsets = store_of([50, 70, 33, 90]).offsets
    plans = {(seed, epoch): plan_rows(offsets, Layout(T, seed), epoch)[0] for seed in (0, 1) for epoch in (0, 1)}
    assert plans[0, 0] == plan_rows(offsets, Layout(T))[0]
    assert len({str(plan) for plan in plans.values()}) == 4
    cuts = [{piece.start for row in plan for piece in row} for plan in plans.values()]
    assert cuts[0] != cuts[1], "other cut points in another epoch"


def test_batches_hold_whole_rows_or_packed_ones() -> None:
    lengths = np.random.default_rng(1).integers(5, 200, 60).tolist()
    rows, _ = plan_rows(np.cumsum([0, *lengths]), Layout(T, group=4))
    kinds = [len(row) == 1 and row[0].length == T for row in rows]
    batches = [kinds[i : i + 4] for i in range(0, len(kinds), 4)]
    mixed = [i for i, batch in enumerate(batches) if len(set(batch)) == 2]
    assert all(i >= len(batches) - 2 for i in mixed)
    assert {True, False} == set(kinds)
    assert len(set(kinds[: len(kinds) // 2])) == 2, "both kinds all over the epoch"


def test_items_do_not_depend_on_how_many_are_asked_for() -> None:
    store = store_of([50, 70, 33])
    short, long = (PackedRows(store, rows, Layout(T, 3, PAD, group=2)) for rows in (8, 50))
    assert len(short) == 8
    assert len(long) == 50
    assert long.epochs > short.epochs
    for i in range(8):
        for name, value in short[i].items():
            assert torch.equal(value, long[i][name])


def test_documents_shorter_than_a_row_are_packed_together() -> None:
    rows, padding = plan_rows(store_of([10, 6, 9, 7]).offsets, Layout(T))
    assert padding == 0
    assert sorted(len(row) for row in rows) == [2, 2]


def test_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="no text"):
        PackedRows(store_of([1]), 4, Layout(T))


def test_validation_rows_begin_with_each_document() -> None:
    store = store_of([40, 10, 33])
    rows = first_rows(store, 10, Layout(T))
    assert [int(row["input_ids"][0]) for row in rows] == [1, 41, 51, 17, 67]
    assert int((rows[1]["labels"] != IGNORED).sum()) == 9
    assert len(first_rows(store, 2, Layout(T))) == 2


def test_stores_are_joined_where_they_are(tmp_path: Path) -> None:
    parts = [store_of([3, 5]), TokenStore.build([]), store_of([4])]
    store = TokenStore.join(parts)
    assert [store[i].tolist() for i in range(3)] == [[1, 2, 3], [4, 5, 6, 7, 8], [1, 2, 3, 4]]
    assert all(np.shares_memory(store[i], parts[0 if i < 2 else 2].tokens) for i in range(3))
    assert store.lengths.tolist() == [3, 5, 4]
    TokenStore.write(tmp_path / "train.text", ((name, store[i]) for i, name in enumerate(store.names)))
    loaded = TokenStore.load(tmp_path / "train.text")
    assert loaded.names == ("0", "1", "0")
    assert [loaded[i].tolist() for i in range(3)] == [store[i].tolist() for i in range(3)]
    assert loaded.tokens.dtype == parts[0].tokens.dtype


def test_the_share_of_tokens_that_see_an_update() -> None:
    """The tokens behind a document's first chunk; the pieces of a cut one begin anew."""
    store = store_of([8, 8, 24, 100])
    rows = PackedRows(store, 5, Layout(32, cut=8))
    lengths = [piece.length for row in rows.plan for piece in row]
    share = sum(n - 8 for n in lengths if n > 8) / sum(lengths)
    assert 0 < share < 1
    assert updates_seen(rows.plan, 8, is_all=True) == f"{share:.1%} of the tokens see an update"
    assert updates_seen(rows.plan, 32, is_all=False) == (
        f"no document in the first {len(lengths)} has more than 32 tokens, so with ttt.chunk_size 32 no token sees an "
        "update"
    )
    with pytest.raises(
        UserError, match=r"no document in the training rows has more than 32 tokens.*make ttt\.chunk_size"
    ):
        updates_seen(rows.plan, 32, is_all=True)
