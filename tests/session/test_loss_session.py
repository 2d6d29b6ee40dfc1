"""Sessions that learn by the loss: any cut, windows that move, forks, files, pools, passes, a chunk that is closed."""

import pytest
import torch
from contract.families import adapted
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import inplace_ttt as ittt
from inplace_ttt import Session, SessionPool, UserError
from inplace_ttt.session.stream import Stream
from inplace_ttt.session.writing import read_exactly

C, WINDOW = 8, 40
TOKENS = torch.randint(1, 97, (200,), generator=torch.Generator().manual_seed(3)).tolist()


def reader(kind, **settings):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        layers = ["sliding_attention", "full_attention"] * 2
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=8, sliding_window=12, layer_types=layers))
    values = {"layers": "0::2", "chunk_size": C, "update_size": 0.1, **settings}
    return ittt.attach(model.double().eval(), ittt.InPlaceTTTConfig(objective="loss", **values))


def session(model, form="dense"):
    return Session(model, window=WINDOW, state=form, probe_every=0)


kinds = pytest.mark.parametrize("kind", ["llama", "gemma3"])


@pytest.mark.parametrize(
    ("kind", "form"), [("llama", "dense"), ("llama", 600), ("gemma3", "dense"), ("gemma3", "auto")]
)
def test_any_cut_of_the_text_and_all_copies_agree(kind, form, tmp_path):
    model = reader(kind)
    whole, parts, at, losses = session(model, form), session(model, form), 0, []
    want = whole.read(TOKENS[:150], scored=True).losses
    for n in (5, 17, 60, 1, 1, 3, 63):
        losses += parts.read(TOKENS[at : at + n], scored=True).losses
        at += n
    assert losses == pytest.approx(list(want), abs=1e-9)
    assert (whole.stats().updates, whole.stats().pending) == (150 // C, 150 % C)
    parts.save(tmp_path / "a.session")
    others = [parts, parts.fork(), Session.load(tmp_path / "a.session", model)]
    more = whole.read(TOKENS[150:200], scored=True).losses
    wrote = whole.generate_ids(max_new_tokens=2 * C)
    for other in others:
        assert other.read(TOKENS[150:200], scored=True).losses == pytest.approx(list(more), abs=1e-9)
        assert other.generate_ids(max_new_tokens=2 * C) == wrote


@kinds
def test_commit_learns_a_part_of_a_chunk(kind):
    s = session(reader(kind))
    s.read(TOKENS[: C // 2])
    assert s.fast_weights[0].S is None
    assert s.learns_by_loss
    assert s.commit()
    assert not s.commit()
    assert (s.stats().updates, s.stats().pending) == (1, 0)
    assert s.fast_weights[0].S.any()
    learned = Session(adapted("llama"))
    assert not learned.learns_by_loss
    with pytest.raises(UserError, match='only objective="loss" can learn from a part of a chunk'):
        learned.commit()


def test_dropping_the_context_learns_what_is_pending_first():
    s = session(reader("llama"))
    s.read(TOKENS[: C + 3])
    before = s.fast_weights[0].S.clone()
    s.drop_context()
    assert not torch.equal(s.fast_weights[0].S, before)
    assert s.stats().in_context == 0


@kinds
def test_a_session_without_context_is_saved_and_loaded(kind, tmp_path):
    model = reader(kind)
    s = session(model)
    s.read(TOKENS[: 3 * C + 3])
    s.drop_context()
    s.save(tmp_path / "a.session")
    again = Session.load(tmp_path / "a.session", model)
    assert again.stats() == s.stats()
    assert again.read(TOKENS[50:90], scored=True).losses == s.read(TOKENS[50:90], scored=True).losses


def test_a_file_with_columns_that_a_dropped_context_left_is_loaded(tmp_path, monkeypatch):
    """As versions before 0.2.0 wrote it."""
    model = reader("llama")
    s = session(model)
    s.read(TOKENS[: 3 * C + 3])
    record = s._stream.record
    s.drop_context()
    monkeypatch.setattr(Stream, "record", record)
    s.save(tmp_path / "a.session")
    monkeypatch.undo()
    again = Session.load(tmp_path / "a.session", model)
    assert again.read(TOKENS[50:90], scored=True).losses == s.read(TOKENS[50:90], scored=True).losses


@pytest.mark.parametrize(("form", "size"), [("dense", 0.1), ("dense", "auto"), ("auto", 0.1), (600, 0.1)])
@pytest.mark.parametrize("sizes", [[3 * C], [5, 2 * C, C - 5]])
def test_a_session_that_learned_nothing_of_what_it_read_is_loaded(form, size, sizes, tmp_path):
    model, at = reader("llama", update_size=size), 0
    s = session(model, form)
    for n in sizes:
        read_exactly(s, TOKENS[at : at + n], False, True)
        at += n
    s.save(tmp_path / "a")
    other = Session.load(tmp_path / "a", model)
    assert other.stats() == s.stats()
    assert s.stats().updates == 3
    with pytest.raises(UserError, match="nothing was learned yet"):
        other.export_lora(tmp_path)
    assert len(other.diagnostics()) == 2
    want = s.read(TOKENS[at : at + 50], scored=True).losses
    assert other.read(TOKENS[at : at + 50], scored=True).losses == pytest.approx(want, abs=1e-12)


def test_passes_learn_a_text_by_heart():
    model, losses = reader("llama", update_size=0.05), []
    for passes in (1, 4, 16):
        s = session(model)
        s.read(TOKENS[:32], passes=passes)
        s.drop_context()
        found = s.read(TOKENS[:32], scored=True).losses
        losses.append(sum(found) / len(found))
    assert losses[0] > losses[1] > losses[2]
    with pytest.raises(UserError, match="passes 0: 1 or more"):
        s.read(TOKENS[:8], passes=0)


@kinds
@pytest.mark.parametrize("learn", ["read", "all"])
def test_a_pool_writes_what_each_session_would(kind, learn):
    model = reader(kind, learn=learn)
    pool, alone = SessionPool(model, window=WINDOW), {}
    for i in range(3):
        part = TOKENS[20 * i : 20 * i + 30 + i]
        pool.open(str(i)).read(part)
        s = session(model)
        s.read(part)
        alone[str(i)] = s.generate_ids(max_new_tokens=2 * C)
    assert pool.generate(list(alone), max_new_tokens=2 * C) == alone


def test_chunks_must_fit_into_the_window():
    with pytest.raises(UserError, match="do not fit twice into a window"):
        Session(reader("llama", chunk_size=32), window=40)
