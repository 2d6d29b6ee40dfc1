"""A session gives what its model gives, however the text comes in and whatever is done in between."""

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from contract.families import LENGTHS, C
from hypothesis import given, settings
from session.models import FAMILIES, TEXT, ids_of, shipped, tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt import Session, UserError
from inplace_ttt.session.stream import Reader

MODELS = {**{family: (lambda family=family: tiny(family)) for family in FAMILIES}, "shipped": shipped}
SMALL = {"window": 28, "sinks": 2}
"""A window that moves on several times within the test texts."""


def session(name: str, **options) -> Session:
    model = MODELS[name]()
    if "decay" not in options:
        options["decay"] = ittt.fast_settings(model)["decay"]
    return Session(model, tokenizer(), **options)


def one_pass(name: str, ids: list[int]) -> torch.Tensor:
    """Logits [n, V] of the model itself."""
    with torch.no_grad():
        logits: torch.Tensor = MODELS[name]()(input_ids=torch.tensor([ids])).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
class TestEqualsTheModel:
    def test_reading_a_text(self, name):
        s = session(name)
        s.read(TEXT)
        torch.testing.assert_close(s.next_logits, one_pass(name, ids_of(TEXT))[-1])

    @pytest.mark.parametrize("length", LENGTHS)
    def test_lengths_around_a_chunk(self, name, length):
        ids = ids_of(TEXT)[:length]
        s = session(name, chunk_size=C)
        s.read(ids)
        with torch.no_grad():
            ittt_model = MODELS[name]()
            before = ittt.fast_settings(ittt_model)
            ittt.configure(ittt_model, chunk_size=C)
            try:
                expected = one_pass(name, ids)[-1]
            finally:
                ittt.configure(ittt_model, **before)
        torch.testing.assert_close(s.next_logits, expected)

    def test_token_by_token(self, name):
        ids, s = ids_of(TEXT)[:70], session(name)
        expected = one_pass(name, ids)
        for i, token in enumerate(ids):
            s.read([token])
            torch.testing.assert_close(s.next_logits, expected[i])

    def test_score_is_the_models_loss(self, name):
        ids = ids_of(TEXT)
        expected = torch.nn.functional.cross_entropy(
            one_pass(name, ids)[:-1].float(), torch.tensor(ids[1:]), reduction="none"
        )
        s = session(name)
        read = s.read(TEXT, scored=True)
        with s.fork() as copy:
            rest = copy._flush(scored=True)
        assert list(read.tokens + rest.tokens) == ids
        torch.testing.assert_close(torch.tensor(read.losses + rest.losses), expected, rtol=1e-4, atol=1e-5)
        scored = session(name).score(TEXT)
        torch.testing.assert_close(torch.tensor(scored.losses), expected, rtol=1e-4, atol=1e-5)

    def test_generate_is_the_models_greedy_text(self, name):
        s = session(name)
        s.read(TEXT)
        wrote = s.generate_ids(max_new_tokens=12)
        expected = one_pass(name, ids_of(TEXT) + wrote)
        assert len(wrote) == 12
        assert wrote == expected[-13:-1].argmax(-1).tolist()
        torch.testing.assert_close(s.next_logits, expected[-1])

    def test_updates_matter_here(self, name):
        s, off = session(name), session(name, lr=0.0)
        s.read(TEXT)
        off.read(TEXT)
        assert (s.next_logits - off.next_logits).abs().max() > 1e-3
        with ittt.updates_off(MODELS[name]()):
            expected = one_pass(name, ids_of(TEXT))[-1]
        torch.testing.assert_close(off.next_logits, expected)


class TestCutting:
    """Any split into reads, any interleaving of fork, snapshot, restore, save and load: the logits of one pass."""

    @pytest.mark.parametrize(
        ("name", "options"),
        [("llama", SMALL), ("llama", {"state": "auto"}), ("glm", {}), ("glm", {**SMALL, "state": "auto"})],
        ids=str,
    )
    @settings(max_examples=6, deadline=None)
    @given(data=st.data())
    def test_any_split_and_any_interleaving(self, name, options, tmp_path_factory, data):
        expected = self.uncut(name, tuple(options.items()))
        s = session(name, **options)
        cuts = sorted(data.draw(st.lists(st.integers(1, len(TEXT) - 1), max_size=5, unique=True)))
        for start, end in pairwise([0, *cuts, len(TEXT)]):
            s.read(TEXT[start:end])
            s = self.meddle(s, data.draw(st.sampled_from(["", "fork", "snapshot", "save", "ask"])), tmp_path_factory)
        torch.testing.assert_close(s.next_logits, expected.next_logits)
        assert s.stats().tokens == expected.stats().tokens == len(ids_of(TEXT))

    @staticmethod
    @cache
    def uncut(name: str, options: tuple[tuple[str, object], ...]) -> Session:
        s = session(name, **dict(options))
        s.read(TEXT)
        return s

    def meddle(self, s: Session, how: str, tmp_path_factory) -> Session:
        if how == "fork":
            twin = s.fork()
            s.read("something else entirely, and a good deal of it" * 3)
            return twin
        if how == "snapshot":
            kept = s.snapshot()
            s.read("something else entirely, and a good deal of it" * 3)
            s.restore(kept)
        elif how == "save":
            path = Path(tmp_path_factory.getbasetemp()) / "cutting.session"
            s.save(path)
            s = Session.load(path, s._reader.model, tokenizer())
        elif how == "ask":
            s.ask("what?", max_new_tokens=3)
            s.score("It was the whale.")
        return s

    @pytest.mark.parametrize("state", ["dense", "auto"])
    def test_a_fork_and_its_parent_read_in_turn(self, state):
        """Also inside a chunk, whose pending tokens each has for itself."""
        ids = ids_of(TEXT)
        texts, parent = (ids[:90], ids[:30] + ids[100:160]), session("llama", state=state)
        parent.read(ids[:30])
        pair = parent, parent.fork()
        for at in range(30, 90, 3):
            for one, text in zip(pair, texts, strict=True):
                one.read(text[at : at + 3])
        for one, text in zip(pair, texts, strict=True):
            torch.testing.assert_close(one.next_logits, one_pass("llama", text)[-1])

    def test_mixed_windows_in_pieces(self):
        whole, pieces = (session("gemma3_text", **SMALL) for _ in range(2))
        whole.read(TEXT)
        for i in range(0, len(TEXT), 7):
            pieces.read(TEXT[i : i + 7])
        torch.testing.assert_close(pieces.next_logits, whole.next_logits)

    def test_the_window_moved_on_in_these_tests(self):
        s = session("llama", **SMALL)
        s.read(TEXT)
        assert s.stats().tokens > 3 * 28
        assert 28 - 28 // 4 + 2 <= s.stats().in_context <= 30


class TestWindow:
    def test_memory_and_positions_are_bounded(self):
        s = session("llama", **SMALL)
        sizes = set()
        for _ in range(12):
            s.read(ids_of(TEXT))
            sizes.add(s.stats().bytes_context)
            assert s._stream.position <= 30
        assert max(sizes) <= 30 * 3 * 2 * 2 * 8 * 8  # tokens, layers, keys and values, heads, width, bytes

    def test_shipped_model_stays_the_same_after_its_positions_were_moved(self, monkeypatch):
        ids = ids_of(TEXT) * 12
        expected = one_pass("shipped", ids)[-1]
        monkeypatch.setattr(Reader, "room", lambda self, stream: 300 - stream.position)
        s = session("shipped")
        s.read(ids)
        assert s._stream.position <= 300 < len(ids)
        # transformers takes rotary angles in float32, in float64 models too: other positions, other rounding.
        torch.testing.assert_close(s.next_logits, expected, rtol=0, atol=1e-3)

    def test_sinks_stay(self):
        s = session("llama", **SMALL)
        s.read(ids_of(TEXT)[:20])
        first = s._stream.cache.layers[0].keys[:, :, :2].clone()
        s.read(ids_of(TEXT) * 2)
        assert torch.equal(s._stream.cache.layers[0].keys[:, :, :2], first)

    def test_absolute_positions_end_with_advice(self):
        s = Session(tiny("gpt2"), tokenizer())
        with pytest.raises(UserError, match="drop_context"):
            s.read(ids_of(TEXT) * 5)
        assert s.stats().tokens == 256
        s.drop_context()
        s.read("It goes on.")
        assert s.stats().tokens > 256

    @pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}, {"window": 10**6}], ids=str)
    def test_refused(self, options):
        with pytest.raises(UserError):
            session("llama", **options)

    def test_narrower_than_the_models_own_window(self):
        with pytest.raises(UserError, match="256"):
            session("shipped", window=100)
        with pytest.raises(UserError, match="too small"):
            session("gemma3_text", window=6)


class TestCausality:
    @pytest.mark.parametrize("name", ["llama", "shipped"])
    def test_a_later_token_never_changes_an_earlier_score(self, name):
        ids = ids_of(TEXT) * 2
        scores = session(name).read(ids, scored=True).losses
        at = len(ids) // 2
        changed = ids[:at] + [(i + 7) % 1000 + 1 for i in ids[at:]]
        others = session(name).read(changed, scored=True).losses
        assert scores[: at - 1] == pytest.approx(others[: at - 1], rel=0, abs=1e-12)
        assert scores[at] != others[at]

    def test_score_leaves_no_trace(self):
        s = session("llama")
        s.read(TEXT)
        before, stats = s.next_logits, s.stats()
        s.score(TEXT * 2)
        s.ask("what?", max_new_tokens=5)
        assert torch.equal(s.next_logits, before)
        assert s.stats() == stats

    def test_scores_differ_by_what_was_read(self):
        s = session("shipped")
        text = "\n".join(f"    self._harpoon_{i} = whaleboat.lance({i})" for i in range(90))
        cold = s.score(text[-600:]).mean
        s.read(text[:-600])
        assert s.score(text[-600:]).mean < cold - 0.5


class TestForgetting:
    def test_reset_is_a_new_session(self):
        s, new = session("llama"), session("llama")
        s.read(TEXT)
        s.reset()
        s.read(TEXT[:100])
        new.read(TEXT[:100])
        assert torch.equal(s.next_logits, new.next_logits)

    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "shipped"])
    def test_after_drop_context_only_the_fast_weights_matter(self, name):
        ids = ids_of(TEXT * 4)
        s = session(name, chunk_size=8)
        s.read(ids[: len(ids) // 8 * 8])  # nothing pending
        s.drop_context()
        assert s.stats().in_context == 0
        question = ids_of("def whale(")[:7]
        s.read(question)
        lora = {i: w.dense()[0].clone() for i, w in s.fast_weights.items()}
        model = MODELS[name]()
        sites = ittt.hf.attach.runtime_of(model).sites
        saved = {x.index: x.projection().weight.detach().clone() for x in sites}
        try:
            with torch.no_grad(), ittt.updates_off(model):
                for x in sites:
                    x.projection().weight += s._reader.config.lr * lora[x.index].to(x.projection().weight.dtype)
                expected = model(input_ids=torch.tensor([question])).logits[0, -1]
        finally:
            with torch.no_grad():
                for x in sites:
                    x.projection().weight.copy_(saved[x.index])
        torch.testing.assert_close(s.next_logits, expected)
        plain = session(name)
        plain.read(question)
        assert (plain.next_logits - expected).abs().max() > 1e-3

    def test_ask_is_generate_after_drop_context(self):
        s = session("llama")
        s.read(TEXT)
        answer = s.ask("the ship", max_new_tokens=8)
        s.drop_context()
        assert s.generate("the ship", max_new_tokens=8) == answer


class TestForks:
    def test_forks_are_independent(self):
        s = session("llama")
        s.read(TEXT)
        a, b = s.fork(), s.fork()
        for text, fork in (("one way " * 9, a), ("another way " * 9, b)):
            fork.read(text)
        again = session("llama")
        again.read(TEXT + "another way " * 9)
        torch.testing.assert_close(b.next_logits, again.next_logits)
        assert not torch.equal(a.next_logits, b.next_logits)

    def test_forks_share_memory_until_they_change(self):
        s = session("llama")
        s.read(TEXT)
        fork = s.fork()
        assert fork.fast_weights[0].S.data_ptr() == s.fast_weights[0].S.data_ptr()

    def test_a_snapshot_serves_more_than_once(self):
        s = session("llama")
        s.read(TEXT)
        kept, seen = s.snapshot(), []
        for _ in range(2):
            s.read("something else " * 4)
            seen.append(s.next_logits)
            s.restore(kept)
        assert torch.equal(*seen)


class TestBreakingOff:
    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "shipped"])
    def test_ctrl_c_in_the_middle_of_a_call_changes_nothing(self, name):
        s, twin = session(name), session(name)
        for x in (s, twin):
            x.read(ids_of(TEXT))
        site = s._reader.runtime.sites[-1]

        def interrupt(*_):
            raise KeyboardInterrupt

        handle = site.mlp.register_forward_pre_hook(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                s.read(ids_of(TEXT))
        finally:
            handle.remove()
        assert s.stats() == twin.stats()
        for x in (s, twin):
            x.read(ids_of(TEXT)[:50])
        torch.testing.assert_close(s.next_logits, twin.next_logits)

    def test_a_source_that_breaks_off(self):
        def source():
            yield TEXT
            raise OSError("gone")

        s = session("llama")
        with pytest.raises(OSError, match="gone"):
            s.read(source())
        assert s.stats().tokens == len(ids_of(TEXT))
        s.read("and on")


class TestWriting:
    def test_stream_gives_the_same_text_in_pieces(self):
        options = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 3}
        a, b = session("shipped"), session("shipped")
        text = a.generate("def main(", **options)
        pieces = list(b.generate("def main(", stream=True, **options))
        assert "".join(pieces) == text
        assert len(pieces) > 3
        assert a.stats() == b.stats()
        assert a.stats().written == 20

    def test_stop_strings_are_left_out(self):
        s = session("shipped")
        full = s.fork().generate("import os\nimport ", max_new_tokens=30)
        at = full.index("\n")
        assert s.generate("import os\nimport ", max_new_tokens=30, stop="\n") == full[:at]

    def test_ends_at_the_end_of_text(self):
        s = session("llama")
        s.read(TEXT)
        first = s.fork().generate_ids(max_new_tokens=1)[0]
        config = s._reader.root.generation_config
        before, config.eos_token_id = config.eos_token_id, first
        try:
            assert s.generate_ids(max_new_tokens=5) == []
        finally:
            config.eos_token_id = before

    def test_busy_while_streaming(self):
        s = session("llama")
        writing = s.generate("It", stream=True, max_new_tokens=5)
        next(writing)
        with pytest.raises(UserError, match="writing"):
            s.read("more")
        writing.close()
        s.read("more")

    def test_nothing_to_continue(self):
        with pytest.raises(UserError, match="nothing to continue"):
            Session(tiny("llama"), tokenizer()).generate()

    @pytest.mark.parametrize(
        "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": 0}, {"max_new_tokens": -1}, {"stop": [""]}], ids=str
    )
    def test_refused(self, wrong):
        s = session("llama")
        with pytest.raises(UserError):
            s.generate("It", **wrong)
        assert s.stats().written == 0

    def test_sampling_follows_the_probabilities(self):
        s = session("llama")
        s.read(TEXT)
        top = set(s.next_logits.topk(3).indices.tolist())
        drawn = {s.fork().generate_ids(max_new_tokens=1, temperature=2.0, top_k=3, seed=i)[0] for i in range(40)}
        assert drawn == top


class TestSources:
    def test_files_iterators_and_paths(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text(TEXT, encoding="utf-8")
        expected = session("llama")
        expected.read(TEXT)
        with open(path, encoding="utf-8") as file:
            for source in (path, file, iter(TEXT), [TEXT[:50], TEXT[50:]]):
                s = session("llama")
                s.read(source)
                assert torch.equal(s.next_logits, expected.next_logits)

    def test_ids_of_any_kind(self):
        ids = ids_of(TEXT)
        for source in (ids, tuple(ids), torch.tensor(ids), torch.tensor([ids])):
            s = Session(tiny("llama"))
            s.read(source)
            assert s.stats().tokens == len(ids)

    @pytest.mark.parametrize("wrong", [torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), [b"bytes"], "text"])
    def test_refused(self, wrong):
        with pytest.raises(UserError):
            Session(tiny("llama")).read(wrong)


def test_special_tokens_in_a_text_are_said():
    """They are read as characters, whatever reads them."""
    special = tokenizer().all_special_tokens[0]
    for act in (lambda s: s.read(f"It {special}"), lambda s: s.generate(f"It {special}", max_new_tokens=1)):
        with pytest.warns(UserWarning, match=f"the text holds '{re.escape(special)}'.*chat prompt has to be token ids"):
            act(Session(tiny("llama"), tokenizer()))


def test_settings_are_the_sessions_own():
    model = tiny("llama")
    s = Session(model, tokenizer(), chunk_size=8, lr=0.5, decay=0.1, clip=0.3)
    s.read(TEXT)
    rest = {"clip_relative": False, "update_size": None, "learn": "read"}
    assert ittt.fast_settings(model) == {"chunk_size": C, "lr": 0.03, "decay": 0.0, "clip": None, **rest}
    assert s.stats().settings == {"chunk_size": 8, "lr": 0.5, "decay": 0.1, "clip": 0.3, **rest}
    assert s.stats().updates == len(ids_of(TEXT)) // 8


def test_a_stream_decays_by_default():
    assert Session(tiny("llama")).stats().settings["decay"] == 0.01
    assert Session(tiny("llama"), decay=0).stats().settings["decay"] == 0.0
    assert Session(shipped()).stats().settings["decay"] == ittt.fast_settings(shipped())["decay"]


@pytest.mark.parametrize("wrong", [{"chunk": 8}, {"state": "sparse"}, {"state": 0}, {"decay": 2.0}], ids=str)
def test_wrong_settings(wrong):
    with pytest.raises((UserError, ValueError)):
        Session(tiny("llama"), tokenizer(), **wrong)


def test_repr_says_where_it_stands():
    s = session("llama", **SMALL)
    s.read(ids_of(TEXT)[: 2 * C + 1])
    stands = f"{2 * C + 1} tokens, 2 updates, 1 tokens pending; window 28, chunk_size {C}"
    assert repr(s) == f"<Session of LlamaForCausalLM: {stands}>"


def test_needs_fast_weights():
    from contract.families import plain

    with pytest.raises(UserError, match="attach"):
        Session(plain("llama"))


def test_updates_off_is_refused():
    s = session("llama")
    with ittt.updates_off(tiny("llama")), pytest.raises(UserError, match="lr=0"):
        s.read(TEXT)
    s.read(TEXT)
