"""Sessions at the edges: odd sources, tiny windows, prefixes, abandoned iterators, models that change underneath."""

import copy
import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from contract.families import adapted
from locations import SHARED
from session.models import TEXT, ids_of, tiny, tokenizer
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt import Session, SessionPool, UserError
from inplace_ttt.session import sources

IDS = [1 + (7 * i) % 90 for i in range(400)]


def session(**options) -> Session:
    return Session(tiny("llama"), tokenizer(), **({"decay": 0} | options))


class TestSources:
    @pytest.mark.parametrize(
        "empty",
        ["", [], (), iter([]), torch.zeros(0, dtype=torch.int64)],
        ids=["text", "list", "tuple", "iterator", "tensor"],
    )
    def test_nothing_read_is_nothing_done(self, empty):
        s = session()
        s.read("hel")
        s.read(empty)
        assert s.stats().held_characters == 3
        assert s.score("").tokens == tuple(ids_of("hel"))[:0]

    @pytest.mark.parametrize("kind", [np.uint16, np.int64, torch.int32], ids=str)
    def test_arrays_of_ids(self, kind):
        ids = torch.tensor(IDS[:40], dtype=kind) if isinstance(kind, torch.dtype) else np.array(IDS[:40], kind)
        a, b, c = (Session(tiny("llama"), decay=0) for _ in range(3))
        a.read(IDS[:40:2])
        b.read(ids[::2])
        c.read(list(ids[::2]) if isinstance(ids, np.ndarray) else ids[::2])
        assert torch.equal(a.next_logits, b.next_logits)
        assert torch.equal(a.next_logits, c.next_logits)

    @pytest.mark.parametrize(
        "wrong",
        [
            *(b"hello", bytearray(b"x"), {"input_ids": [1]}, None, 5, [1, "a"], [b"x"], "ab\ud800", [True]),
            *(np.zeros(3), np.array([True]), torch.tensor([True]), torch.ones(1).bfloat16(), [5, 10**6], [-1], [2**70]),
        ],
        ids=lambda wrong: ascii(wrong),
    )
    def test_refused_and_nothing_changed(self, wrong):
        s = session()
        s.read("hel")
        before = s.stats()
        with pytest.raises(UserError):
            s.read(wrong)
        assert s.stats() == before
        with pytest.raises(UserError):
            session().generate(wrong if wrong is not None else "")

    def test_a_file_that_is_no_text(self, tmp_path: Path):
        (tmp_path / "x").write_bytes(b"abc\xff")
        with pytest.raises(UserError, match="UTF-8"):
            session().read(tmp_path / "x")

    def test_long_sources_cost_what_they_are_long(self, monkeypatch):
        """A long text comes in blocks, and long ids are not copied again and again."""
        monkeypatch.setattr(sources, "BLOCK", 7)
        s, whole = session(), session()
        s.read(TEXT)
        monkeypatch.undo()
        whole.read(TEXT)
        assert torch.equal(s.next_logits, whole.next_logits)
        assert max(map(len, sources.texts("x" * (3 * sources.BLOCK + 1)))) == sources.BLOCK

        class Counting(list):
            copied = 0

            def __getitem__(self, key):
                found = super().__getitem__(key)
                Counting.copied += len(found) if isinstance(key, slice) else 1
                return found

        monkeypatch.setattr(s._reader, "piece", 4)
        s._probe_every = 16
        for _ in s._feed(Counting(IDS), True):
            pass
        assert Counting.copied < 4 * len(IDS)


@pytest.fixture(scope="module")
def with_bos():
    path = SHARED / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip(f"no test data at {path}")
    own = AutoTokenizer.from_pretrained(path)
    return adapted("llama", torch.float64, {"vocab_size": len(own)}), own


class TestPrefix:
    def test_once_a_stream_and_never_twice(self, with_bos):
        ids = with_bos[1]("Once upon a time")["input_ids"]
        bos = ids[0]
        for source in ("Once upon a time", ids, ids[1:]):
            s = Session(*with_bos)
            s.read(source)
            s.drop_context()
            assert s.stats().tokens == len(ids)
            s.read([])
            assert s.stats().tokens == len(ids)
            s.read([9])
            assert s._stream.recent == [bos, 9]

    def test_counted_before_it_is_read(self, with_bos):
        s = Session(*with_bos)
        s.read("Once")
        before = s.stats().tokens
        s._flush()
        assert s.stats().tokens == before

    def test_an_empty_session_begins_with_it(self, with_bos):
        s = Session(*with_bos)
        s.generate_ids(max_new_tokens=0)
        assert s._stream.recent == s._encoder.prefix
        assert SessionPool(*with_bos).generate({"a": None}, max_new_tokens=0) == {"a": ""}

    def test_a_first_call_that_breaks_off_did_not_begin_the_stream(self, with_bos, monkeypatch):
        s = Session(*with_bos)
        with monkeypatch.context() as patch:
            patch.setattr(s._reader, "call", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                s.read([5, 6])
        s.read([5, 6])
        assert s._stream.recent == [*s._encoder.prefix, 5, 6]


class TestWindows:
    @pytest.mark.parametrize("window", [1, 2, 3])
    @pytest.mark.parametrize("sinks", [0, 1, 5])
    def test_tiny(self, window, sinks):
        whole, single = (session(window=window, sinks=sinks, chunk_size=5) for _ in range(2))
        whole.read(IDS[:40])
        for token in IDS[:40]:
            single.read([token])
        torch.testing.assert_close(whole.next_logits, single.next_logits)
        assert whole.stats().in_context <= window + sinks

    def test_a_window_of_one_sees_one(self):
        a, b = session(window=1, sinks=0, lr=0), session(lr=0)
        a.read(IDS[:9])
        b.read(IDS[8:9])
        torch.testing.assert_close(a.next_logits, b.next_logits)

    @pytest.mark.parametrize("wrong", [{"sinks": 256}, {"window": 9.5}, {"window": True}, {"sinks": "x"}], ids=str)
    def test_refused(self, wrong):
        with pytest.raises(UserError):
            session(**wrong)

    def test_the_context_can_be_dropped_when_it_is_full(self):
        s = Session(tiny("gpt2"), tokenizer())
        s.read(IDS[:250])
        s.read("It is a way I have of driving off the spleen, and regulating it.")
        s.drop_context()
        assert (s.stats().in_context, s.stats().held_characters) == (0, 0)
        assert s.stats().tokens > 256


class TestProbes:
    def test_without_updates_no_more_is_seen_than_with_them(self):
        """lr = 0: the fast weights change nothing, so both losses must be the same, whatever the window."""
        for options in ({}, {"window": 40, "sinks": 0}):
            s = session(lr=0.0, probe_every=60, **options)
            s.read(IDS[:60])
            s.read(IDS[60:330])
            on, off = s.timeline.loss_on, s.timeline.loss_off
            assert len(on)
            assert off == pytest.approx(on, abs=0.15 if options else 1e-6)

    def test_no_look_where_it_would_not_fit(self):
        s = Session(tiny("gpt2"), tokenizer(), probe_every=10)
        s.read(IDS[:20])
        with pytest.raises(UserError, match="full"):
            s.read(IDS[:300])
        assert s.stats().tokens == 256

    @pytest.mark.parametrize("wrong", [-1, 0.5, "x"])
    def test_refused(self, wrong):
        with pytest.raises(UserError):
            session(probe_every=wrong)


class TestIterators:
    def test_ask_in_pieces_gives_the_same_answer(self):
        s = session()
        s.read(TEXT)
        whole = s.ask("the ship", max_new_tokens=8)
        assert "".join(s.ask("the ship", max_new_tokens=8, stream=True)) == whole

    def test_left_behind(self):
        s, pool = session(), SessionPool(tiny("llama"), tokenizer())
        writing = s.generate("It", stream=True)
        next(writing)
        del writing
        writing = pool.generate({"a": "It", "b": "was"}, stream=True)
        next(writing)
        del writing
        gc.collect()
        for left in (s, pool["a"], pool["b"]):
            left.read("more")

    def test_wrong_options_are_refused_at_once(self):
        s = session()
        counts = ({"max_new_tokens": n} for n in (-1, 1.5, None, True))  # 1.5 would never come down to 0
        for wrong in (*counts, {"stop": [""]}, {"top_k": 0}, {"do_sample": True}):
            with pytest.raises(UserError):
                s.generate("It", stream=True, **wrong)

    def test_a_callback_that_fails(self):
        s = session()
        with pytest.raises(ZeroDivisionError):
            s.read(IDS, progress=lambda n: 1 / 0)
        s.read(IDS[:5])

    def test_what_is_written_stays_whole_when_the_session_is_left(self):
        with session() as s:
            s.read(TEXT)
            expected = s.fork().generate("It", max_new_tokens=6)
            writing = s.generate("It", stream=True, max_new_tokens=6)
            begun = next(writing)
        assert begun + "".join(writing) == expected
        assert (s.stats().tokens, s.stats().held_characters) == (0, 0)


class TestSharing:
    def test_logits_are_the_callers_own(self):
        s = session()
        s.read(IDS[:9])
        s.next_logits.zero_()
        assert s.next_logits.any()

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
    def test_copies_are_independent(self, duplicate):
        s = Session(adapted("llama"), decay=0)
        s.read(IDS[:9])
        before, twin = s.next_logits, duplicate(s)
        twin.read(IDS[9:20])
        assert torch.equal(s.next_logits, before)
        s.read(IDS[9:20])
        assert torch.equal(s.next_logits, twin.next_logits)

    def test_a_snapshot_of_another_kind_of_session(self):
        s = session()
        s.read(TEXT)
        for other in (session(chunk_size=8), Session(tiny("glm"), tokenizer())):
            with pytest.raises(UserError, match="snapshot"):
                other.restore(s.snapshot())


class TestTheModelUnderneath:
    def test_its_modes_come_back(self):
        model = adapted("llama")
        model.train()
        model.model.layers[0].eval()
        modes = [module.training for module in model.modules()]
        Session(model).read(IDS[:9])
        assert [module.training for module in model.modules()] == modes

    def test_other_settings_of_the_model_do_not_matter(self):
        model = adapted("llama")
        a, b = Session(model, decay=0.01), Session(adapted("llama"), decay=0.01)
        a.read(IDS[:10])
        ittt.configure(model, chunk_size=8, lr=3.0, decay=0.5)
        ittt.set_lr(model, 7.0)
        a.read(IDS[10:40])
        b.read(IDS[:40])
        torch.testing.assert_close(a.next_logits, b.next_logits)

    @pytest.mark.parametrize("objective", ["learned", "loss"])
    @pytest.mark.parametrize("again", [False, True])
    def test_fast_weights_that_were_taken_out(self, again, objective, tmp_path):
        model = adapted("llama", changes={"vocab_size": len(tokenizer())}, objective=objective)
        pool = SessionPool(model, tokenizer())
        s = pool.open("s")
        s.read(IDS[:9])
        before, shown = s.stats(), repr(s)
        ittt.detach(model)
        if again:
            ittt.attach(model, ittt.InPlaceTTTConfig(layers="0::2", chunk_size=4))
        refused = [
            lambda: s.read(IDS[:9]),
            lambda: s.score(IDS[:9]),
            lambda: s.generate_ids(),
            lambda: s.save(tmp_path / "s"),
            lambda: s.export_lora(tmp_path / "lora"),
            lambda: s.diagnostics(),
            lambda: pool.generate(["s"]),
        ]
        if objective == "loss":
            refused += [lambda: s.commit(), lambda: s.drop_context(), lambda: s.study(TEXT)]
        for call in refused:
            with pytest.raises(UserError, match="begin a new one"):
                call()
        assert "begin a new one" in s.warning
        assert s.stats() == replace(before, warning=s.warning)
        assert repr(s) == repr(s.fork()) == shown.replace("; window", "; the model was detached; window")
        assert pool.nbytes == before.bytes_context + before.bytes_fast_weights
        s.reset()
        assert s.stats().tokens == 0

    def test_inference_mode_comes_and_goes(self):
        s, plain = session(), session()
        with torch.inference_mode():
            s.read(IDS[:6])
            kept = s.snapshot()
        s.read(IDS[6:13])
        with torch.inference_mode():
            s.read(IDS[13:20])
            s.restore(kept)
        s.read(IDS[6:30])
        plain.read(IDS[:30])
        torch.testing.assert_close(s.next_logits, plain.next_logits)


class TestPool:
    def pool(self) -> SessionPool:
        return SessionPool(tiny("llama"), tokenizer(), decay=0, batch=1)

    def test_nothing_to_continue_in_one_stops_before_any_other(self):
        pool = self.pool()
        before = pool.open("a").read(TEXT) and pool["a"].stats()
        with pytest.raises(UserError, match="nothing to continue"):
            pool.generate({"a": " and", "b": None}, max_new_tokens=3)
        assert pool["a"].stats() == before
        alone = session()
        alone.read(TEXT)
        assert pool.generate({"a": " and", "b": "It"}, max_new_tokens=3)["a"] == alone.generate(
            " and", max_new_tokens=3
        )

    def test_a_session_is_in_it_once(self):
        pool = self.pool()
        with pytest.raises(UserError, match="already"):
            pool.add("b", pool.open("a"))

    def test_a_session_that_is_writing(self):
        s = session()
        writing = s.generate("It", stream=True)
        next(writing)
        with pytest.raises(UserError, match="writing"):
            self.pool().add("a", s)

    def test_a_text_is_no_list_of_names(self):
        with pytest.raises(UserError, match="names"):
            self.pool().generate("chat")

    def test_a_session_without_a_tokenizer_among_others(self):
        pool, s = self.pool(), Session(tiny("llama"), decay=0)
        s.read(IDS[:9])
        expected = s.fork().generate_ids(max_new_tokens=3)
        pool.add("ids", s)
        wrote = pool.generate({"ids": None, "text": "It"}, max_new_tokens=3)
        assert wrote["ids"] == expected
        assert isinstance(wrote["text"], str)
