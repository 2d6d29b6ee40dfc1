"""Many sessions in one batch: each writes what it writes alone."""

import pytest
import torch
from session.models import TEXT, ids_of, shipped, tiny, tokenizer

from inplace_ttt import Session, SessionPool, UserError

PIECES = ["", TEXT[:9], TEXT[:60], TEXT[30:200], TEXT * 2]
"""Nothing read, less than a chunk, some chunks, a window that moved on."""
MODELS = {
    "llama": ("llama", {"window": 40, "sinks": 2}),
    "gemma3_text": ("gemma3_text", {"window": 40, "sinks": 2}),
    "glm": ("glm", {}),
    "gpt2": ("gpt2", {}),
    "shipped": (None, {}),
}


def model(name: str):
    family, options = MODELS[name]
    return (shipped() if family is None else tiny(family)), {"decay": 0.01, **options}


def alone(name: str, texts: list[str], prompts: list[str], state="dense", **options) -> tuple[list[str], list[Session]]:
    m, settings = model(name)
    sessions = [Session(m, tokenizer(), state=state, **settings) for _ in texts]
    wrote = []
    for s, text, prompt in zip(sessions, texts, prompts, strict=True):
        if text:
            s.read(text)
        wrote.append(s.generate(prompt, **options))
    return wrote, sessions


def pooled(name: str, texts: list[str], prompts: list[str], batch=32, state="dense", **options):
    m, settings = model(name)
    pool = SessionPool(m, tokenizer(), batch=batch, state=state, **settings)
    for i, text in enumerate(texts):
        if text:
            pool.open(f"{i}").read(text)
    wrote = pool.generate({f"{i}": prompt for i, prompt in enumerate(prompts)}, **options)
    return [wrote[f"{i}"] for i in range(len(texts))], pool


PROMPTS = ["It was", " the whale", "def", " and", " so"]


@pytest.mark.parametrize(
    ("name", "batch"), [("llama", 32), ("llama", 2), ("gemma3_text", 2), ("glm", 32), ("gpt2", 2), ("shipped", 32)]
)
def test_each_writes_what_it_writes_alone(name, batch):
    texts = PIECES if name != "gpt2" else [*PIECES[:4], TEXT]
    most = 12 if name == "shipped" else 14
    expected, sessions = alone(name, texts, PROMPTS, max_new_tokens=most)
    wrote, pool = pooled(name, texts, PROMPTS, batch, max_new_tokens=most)
    assert wrote == expected
    for i, s in enumerate(sessions):  # and afterwards stands where it would stand alone
        torch.testing.assert_close(pool[f"{i}"].next_logits, s.next_logits)
        assert pool[f"{i}"].stats().to_dict() | {"bytes_context": 0} == s.stats().to_dict() | {"bytes_context": 0}
        s.read(TEXT[:40])
        pool[f"{i}"].read(TEXT[:40])
        torch.testing.assert_close(pool[f"{i}"].next_logits, s.next_logits)


@pytest.mark.parametrize("state", ["auto", 8], ids=str)
@pytest.mark.parametrize("name", ["llama", "shipped"])
def test_other_forms_of_the_state(name, state):
    """Pairs are exact. Rank 8 is an approximation, but the same one alone and in the pool, up to when it is cut."""
    texts = PIECES if state == "auto" else PIECES[:2]
    expected, _ = alone(name, texts, PROMPTS[: len(texts)], state=state, max_new_tokens=8)
    wrote, pool = pooled(name, texts, PROMPTS[: len(texts)], state=state, max_new_tokens=8)
    assert wrote == expected
    if state == "auto":
        dense, others = alone(name, texts, PROMPTS, max_new_tokens=8)
        assert wrote == dense
        if name == "llama":  # session 1: some chunks; session 4: far too many for pairs
            assert pool["1"].fast_weights[0].S is None
            assert pool["4"].fast_weights[0].S is not None
            assert pool["1"].stats().bytes_fast_weights < others[1].stats().bytes_fast_weights


def test_sampling_with_a_seed():
    options = {"max_new_tokens": 15, "temperature": 1.2, "top_k": 50, "repetition_penalty": 1.2, "seed": 7}
    assert pooled("llama", PIECES, PROMPTS, **options)[0] == alone("llama", PIECES, PROMPTS, **options)[0]


def test_they_end_at_different_times():
    expected, _ = alone("shipped", PIECES, PROMPTS, max_new_tokens=30, stop=["\n", ","])
    assert len({len(text) for text in expected}) > 2
    assert pooled("shipped", PIECES, PROMPTS, max_new_tokens=30, stop=["\n", ","])[0] == expected


def test_streaming_interleaves_and_can_be_left():
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    pieces = pool.generate({"a": "It was", "b": " the"}, stream=True, max_new_tokens=20)
    seen = [next(pieces) for _ in range(8)]
    assert {name for name, _ in seen} == {"a", "b"}
    with pytest.raises(UserError, match="writing"):
        pool["a"].read("more")
    pieces.close()
    for name in "ab":
        s = Session(m, tokenizer(), **settings)
        s.generate_ids({"a": "It was", "b": " the"}[name], max_new_tokens=pool[name].stats().written)
        torch.testing.assert_close(pool[name].next_logits, s.next_logits)


def test_a_step_that_breaks_off_leaves_all_rows_as_they_were(monkeypatch):
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    pieces = pool.generate({"a": "It was", "b": " the"}, stream=True, max_new_tokens=20)
    for _ in range(6):
        next(pieces)
    site = pool["a"]._reader.runtime.sites[-1]
    handle = site.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    handle.remove()
    for name, prompt in {"a": "It was", "b": " the"}.items():
        s = Session(m, tokenizer(), **settings)
        s.generate_ids(prompt, max_new_tokens=pool[name].stats().written)
        torch.testing.assert_close(pool[name].next_logits, s.next_logits)


def test_one_call_for_all_rows(monkeypatch):
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    for i in range(5):
        pool.open(f"{i}").read(ids_of(TEXT)[: 20 + i])
    sizes = []
    own = pool._blank._reader.call

    def count(cache, ids, *args, **kwargs):
        sizes.append(tuple(ids.shape))
        return own(cache, ids, *args, **kwargs)

    monkeypatch.setattr(pool._blank._reader, "call", count)
    pool.generate([f"{i}" for i in range(5)], max_new_tokens=4)
    assert sizes.count((5, 1)) == 4


def test_forks_share_what_was_read():
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    pool.open("book").read(TEXT)
    pool.fork("book", "reader")
    assert pool["reader"].fast_weights[0].S.data_ptr() == pool["book"].fast_weights[0].S.data_ptr()
    assert len(pool) == 2
    assert set(pool) == {"book", "reader"}
    pool.close("book")
    assert "book" not in pool


def test_files(tmp_path):
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    pool.open("a").read(TEXT)
    pool["a"].save(tmp_path / "a.session")
    pool.load("b", tmp_path / "a.session")
    pool.open("c").read(TEXT[:50])  # shorter: a batch with padding, which the fast weights remember
    wrote = pool.generate(["a", "b", "c"], max_new_tokens=5)
    assert wrote["a"] == wrote["b"]
    pool["c"].save(tmp_path / "c.session")
    pool.load("d", tmp_path / "c.session")
    wrote = pool.generate(["a", "c", "d"], max_new_tokens=5)
    assert wrote["c"] == wrote["d"]


def test_refused(tmp_path):
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    with pytest.raises(UserError, match="no session"):
        pool["x"]
    with pytest.raises(UserError, match="settings"):
        pool.add("x", Session(m, tokenizer(), **{**settings, "decay": 0.5}))
    with pytest.raises(UserError, match="settings"):
        pool.add("x", Session(tiny("glm"), tokenizer(), **{**settings, "window": 20}))
    pool.open("x")
    with pytest.raises(UserError, match="already"):
        pool.add("x", Session(m, tokenizer(), **settings))
    with pytest.raises(UserError, match="batch"):
        SessionPool(m, batch=0)
    with pytest.raises(UserError, match="nothing to continue"):
        pool.generate(["x"])


def test_what_a_session_wrote_is_given_once_where_its_context_is_full():
    m, settings = model("gpt2")  # its window cannot move on
    pool = SessionPool(m, tokenizer(), **settings)
    pool.open("a").read(TEXT)
    writers = pool.writers()
    writer = writers.join(pool["a"], max_new_tokens=10_000)
    text = ""
    while not writer.finished:
        writers.step()
        text += writer.piece
    assert writer.finished == "error"
    assert "context is full" in str(writer.error)
    assert text == tokenizer().decode(writer.ids)


def test_a_prediction_that_is_not_a_number_ends_its_own_session_only():
    m, settings = model("llama")
    pool = SessionPool(m, tokenizer(), **settings)
    for name in "ab":
        pool.open(name).read(TEXT[:60])
    want = pool["b"].fork().generate(max_new_tokens=3)
    writers = pool.writers()
    lost, other = (writers.join(pool[name], max_new_tokens=3) for name in "ab")
    pool["a"]._stream.logits = torch.full_like(pool["a"]._stream.logits, float("nan"))
    text = ""
    while writers.active:
        writers.step()
        text += other.piece
    assert lost.finished == "error"
    assert "ran away" in str(lost.error)
    assert text == want
