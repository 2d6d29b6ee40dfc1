"""A chat in Python: the tokens of the template, each once, and transformers' own answers."""

import warnings

import pytest
import torch
from cli.tiny_models import byte_tokenizer, chat_tokenizer, tiny

import inplace_ttt as ittt
from inplace_ttt import Session, UserError
from inplace_ttt.session.writing import Writer

WORDS = "the file of a block is read and then it is written where it was " * 20
ASKED = ("where is the file", "  and then?<|im_end|>")


def reader(**settings):
    model = tiny(sliding_window=None, max_position_embeddings=512, num_hidden_layers=2)
    values = {"objective": "loss", "layers": ":", "chunk_size": 16, "update_size": 0.05, **settings}
    return ittt.attach(model.double(), ittt.InPlaceTTTConfig(**values))


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(WORDS)


def own(session, tokenizer, messages):
    """What transformers writes after a conversation, with the session's fast weights nowhere."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with ittt.updates_off(session._reader.model):
        out = session._reader.model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=ends)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("whole", [False, True])
def test_two_turns_are_what_transformers_writes(tokenizer, whole):
    """Given the new messages or the whole chat; nothing is learned, so the model is the plain one."""
    session, said = Session(reader(), tokenizer, decay=0), []
    for words in ("where is the file", "and then?"):
        new = {"role": "user", "content": words}
        said = [*said, new]
        want = own(session, tokenizer, said)
        got = session.chat(said if whole else [new], learn=(), max_new_tokens=12)
        assert got == want
        said = [*said, {"role": "assistant", "content": got}]
    assert all(fast.S is None or not fast.S.any() for fast in session.fast_weights.values())
    ids = tokenizer.apply_chat_template(said, return_dict=False)
    assert session._stream.recent == ids
    assert "".join(session.chat([{"role": "user", "content": "x"}], stream=True, max_new_tokens=3)) is not None


def test_a_chat_leaves_the_model_and_other_sessions_as_they_were(tokenizer):
    model = reader()
    before, end = model.generation_config.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    a, b = Session(model, tokenizer), Session(model, tokenizer)
    a.chat([{"role": "user", "content": "where is the file"}], max_new_tokens=2)
    assert model.generation_config.eos_token_id == before
    for session, ends in ((a, True), (a.fork(), True), (b, False)):
        assert (end in Writer(session, 1).ends) == ends


def test_what_looks_like_a_special_token_is_text(tokenizer):
    session = Session(reader(), tokenizer)
    for words in ASKED:
        session.chat([{"role": "user", "content": words}], max_new_tokens=4)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert session._stream.recent.count(end) == 5  # system, two of the user, two of the model


def test_roles_that_are_learned(tokenizer):
    """Each message by itself; a turn's pending tokens are learned at its end."""
    turn = [{"role": "system", "content": "it is written"}, {"role": "user", "content": "where is the file"}]
    learned = {}
    for roles in ((), ("user",), ("system",), ("system", "user"), None):
        session = Session(reader(), tokenizer)
        session.chat(turn, learn=roles, max_new_tokens=4)
        assert session.stats().pending == 0
        S = session.fast_weights[0].S
        learned[roles] = torch.zeros(1) if S is None else S
    assert not learned[()].any()
    assert learned[("user",)].any()
    assert learned[("system",)].any()
    assert not torch.equal(learned[("user",)], learned[("system", "user")])
    written = {}
    for learn in ("read", "all"):
        session = Session(reader(learn=learn), tokenizer)
        session.chat(turn, learn=(), max_new_tokens=20)
        S = session.fast_weights[0].S
        written[learn] = S is not None and bool(S.any())
    assert written == {"read": False, "all": True}


def test_a_turn_is_taken_whole_or_not_at_all(tokenizer, monkeypatch):
    session = Session(reader(), tokenizer)
    before = session.stats()
    with pytest.raises(UserError, match="max_new_tokens -1"):
        session.chat([{"role": "user", "content": "x"}], max_new_tokens=-1)
    monkeypatch.setattr("inplace_ttt.session.template.write", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        session.chat([{"role": "user", "content": "x"}])
    assert session.stats() == before
    monkeypatch.undo()
    pieces = session.chat([{"role": "user", "content": "where"}], stream=True, max_new_tokens=20)
    next(pieces)
    pieces.close()  # the turn ends here
    assert session._stream.recent[-2:] == tokenizer("<|im_end|>\n", add_special_tokens=False)["input_ids"]


def test_refusals(tokenizer):
    with pytest.raises(UserError, match="no chat template: use generate"):
        Session(reader(), byte_tokenizer(WORDS)).chat([{"role": "user", "content": "x"}])
    session = Session(reader(), tokenizer)
    with pytest.raises(UserError, match="no new message"):
        session.chat([])


def test_asking_says_when_nothing_was_learned(tokenizer):
    session = Session(reader(), tokenizer)
    with pytest.warns(UserWarning, match=r"nothing has been learned so far \(0 updates: a chunk is 16 tokens\)"):
        answer = session.ask("where is the file", chat=True, max_new_tokens=8)
    assert session.stats().tokens == 0
    assert answer == session.fork().chat([{"role": "user", "content": "where is the file"}], max_new_tokens=8)
    session.read("where is it")  # less than a chunk: learned when the context is dropped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.ask("where is the file", max_new_tokens=1)
    learned = Session(reader(objective="learned", update_size=None), tokenizer)
    learned.read("where is it")
    with pytest.warns(UserWarning, match="nothing has been learned"):
        learned.ask("where", max_new_tokens=1)
