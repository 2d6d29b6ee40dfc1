"""Studying a text: what is learned, from what, and what stays as it was."""

import itertools
import random
from importlib import import_module

import pytest
import torch
from cli.tiny_models import byte_tokenizer, chat_tokenizer, tiny

import inplace_ttt as ittt
from inplace_ttt import Session, UserError
from inplace_ttt.core import FastWeights
from inplace_ttt.hf.attach import runtime_of
from inplace_ttt.hf.loss import learn_from
from inplace_ttt.session.study import Example, Pair, batches, is_about, learn, names, sentences

module = import_module("inplace_ttt.session.study")
TEXT = "The code of the Mill is 7314. It was read by Tobias Renner, twice!\n\nThen the file was written. Why?"
TOLD = ["The code of the Mill is 7314.", "It was read by Tobias Renner, twice!", "Then the file was written."]
QUESTION = "What is the code of the Mill?"
ASKED = f" {QUESTION}\nAnswer: 7314\n\nText: and more"


def reader(rule="sum", **settings):
    model = tiny(sliding_window=None, max_position_embeddings=512, num_hidden_layers=2)
    values = {
        "objective": "loss",
        "layers": ":",
        "chunk_size": 16,
        "update_size": 0.03 if rule == "sum" else None,
        "rule": rule,
        **settings,
    }
    return ittt.attach(model.double(), ittt.InPlaceTTTConfig(**values))


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(TEXT * 20)


def says(wrote):
    """A model that writes this wherever it may ask as it likes."""
    return lambda model, tok, prompts, *a: [wrote if tok.decode(ids).endswith("Question:") else "" for ids in prompts]


@pytest.fixture
def clock(monkeypatch):
    """A tenth of a second passes each time somebody looks; the model asks one question."""
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks) / 10)
    monkeypatch.setattr(module, "write_many", says(ASKED))


def alone(session, text):
    """Loss of a text with nothing before it."""
    with session.fork() as copy:
        copy.drop_context()
        return copy.score(text).mean


@pytest.mark.parametrize(("form", "size"), [("dense", 0.03), ("auto", 0.03), ("dense", "auto")])
def test_sentences_are_learned_where_nothing_is_asked_and_the_context_stays(
    tokenizer, clock, monkeypatch, tmp_path, form, size
):
    monkeypatch.setattr(module, "write_many", says(""))
    monkeypatch.setattr(module, "SIZE", 0.03)  # instead of "auto"
    session = Session(reader(update_size=size), tokenizer, state=form)
    session.read("it is written where the file was read by the code of a block")
    before = [alone(session, text) for text in TOLD]
    session.commit()
    keys, stats, logits = session._stream.cache.layers[0].keys, session.stats(), session.next_logits
    seen = []
    took = session.study(TEXT, minutes=1, progress=lambda share, loss: seen.append((share, loss)))
    assert (took.sentences, took.questions) == (3, 0)
    assert took.updates == len([x for _, x in seen if x is not None]) > 5
    assert took.losses[-1] < took.losses[0] - 0.3
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert all(alone(session, text) < old - 0.3 for text, old in zip(TOLD, before, strict=True))
    assert session._stream.cache.layers[0].keys is keys
    assert torch.equal(session.next_logits, logits)
    now = session.stats()
    assert (now.tokens, now.in_context, now.pending) == (stats.tokens, stats.in_context, 0)
    assert now.updates == stats.updates + took.updates
    session.save(tmp_path / "s")
    others = [session, session.fork(), Session.load(tmp_path / "s", session._reader.model, tokenizer)]
    losses = [other.read("then the file was read " * 40, scored=True).losses for other in others]
    assert len(losses[0]) > 100
    assert all(x == pytest.approx(losses[0], abs=1e-12) for x in losses)


def test_ordinary_text_stays_as_it_was(tokenizer, clock, monkeypatch):
    """Held to its own predictions on the text's sentences, the model drifts less while it learns a question."""
    drifts = []
    for keep in (0.0, 2.0):
        monkeypatch.setattr(module, "KEEP", keep)
        session = Session(reader(), tokenizer)
        before = [alone(session, text) for text in TOLD]
        assert session.study(TEXT, minutes=1).questions == 1
        drifts.append(sum(abs(alone(session, text) - old) for text, old in zip(TOLD, before, strict=True)))
    assert drifts[1] < 0.7 * drifts[0]


def test_the_model_s_own_predictions_are_no_loss_at_first(tokenizer):
    model = reader()
    examples = module.Examples(tokenizer, None).ordinary(TOLD[0])
    assert [x.keeps for x in examples] == [True]
    states = {site.index: FastWeights(1, 16, runtime_of(model).settings.rule) for site in runtime_of(model).sites}
    assert abs(learn(model, states, [examples], runtime_of(model).config)) < 1e-12


@pytest.mark.parametrize("size", [0.03, "auto"])
def test_a_session_that_has_read_nothing(tokenizer, clock, tmp_path, size):
    session = Session(reader(update_size=size), tokenizer)
    took = session.study(TEXT, minutes=0.3)
    assert session.stats().updates == took.updates > 0
    assert session.stats().in_context == 0
    session.save(tmp_path / "s")
    other = Session.load(tmp_path / "s", session._reader.model, tokenizer)
    assert other.ask("where", max_new_tokens=8) == session.ask("where", max_new_tokens=8)
    losses = session.read(TEXT * 8, scored=True).losses
    assert len(losses) > 100
    assert other.read(TEXT * 8, scored=True).losses == pytest.approx(losses, abs=1e-12)


def test_what_progress_raises_ends_it_and_what_was_learned_stays(tokenizer, clock):
    def stop(share, loss):
        if loss is not None:
            raise KeyboardInterrupt

    session = Session(reader(), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        session.study(TEXT, minutes=1, progress=stop)
    assert session.stats().updates == 1
    assert session.fast_weights[0].S.any()


@pytest.mark.parametrize("chat", [True, False])
def test_the_answer_to_a_question_is_learned(tokenizer, clock, monkeypatch, chat):
    """In the chat template, and as plain text where there is none; not where the model asks nothing."""
    tok = tokenizer if chat else byte_tokenizer(TEXT * 20)
    asked = module.Examples(tok, module.Template(tok) if chat else None).answered(Pair("", QUESTION, "7314"))
    ids, losses = [*asked.prompt, *asked.answer], []
    assert tok.decode(ids).endswith("<|im_start|>assistant\n7314<|im_end|>" if chat else f"{QUESTION}\nAnswer: 7314\n")
    for wrote in (ASKED, ""):
        monkeypatch.setattr(module, "write_many", says(wrote))
        session = Session(reader(), tok)
        assert session.study(TEXT, minutes=1).questions == bool(wrote)
        found = [x for _, found in session._feed(ids, True, False) for x in found][-len(asked.answer) :]
        losses.append(sum(found) / len(found))
    assert losses[0] < losses[1] - 0.2


def test_a_model_and_a_tokenizer_without_an_end():
    tok = byte_tokenizer(TEXT * 20)
    tok.eos_token = None
    model = reader()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    prompts, want = [tok(text)["input_ids"] for text in TOLD], []
    for ids in prompts:
        written = list(ids)
        with torch.no_grad(), ittt.updates_off(model):
            for _ in range(6):
                written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
        want.append(tok.decode(written[len(ids) :], skip_special_tokens=True))
    assert module.write_many(model, tok, prompts, 6) == want
    session = Session(model, tok)
    assert session.study(TEXT, minutes=0.02).updates == session.stats().updates > 0


def test_refusals(tokenizer):
    session = Session(reader(), tokenizer)
    for call, why in (
        (lambda: Session(reader()).study(TEXT), "no tokenizer"),
        (lambda: Session(reader(objective="learned", update_size=None), tokenizer).study(TEXT), 'objective="loss"'),
        (lambda: Session(reader(rule="delta"), tokenizer).study(TEXT), "rule 'delta' is not outer, which study needs"),
        (lambda: Session(reader(), tokenizer, state=8).study(TEXT), "not rank 8"),
        (lambda: session.study(TEXT, minutes=0), "minutes 0: a number above 0"),
        (lambda: session.study([1, 2, 3]), "not token ids"),
        (lambda: session.study("no"), "nothing to study"),
    ):
        with pytest.raises(UserError, match=why):
            call()


def test_sentences():
    assert sentences(TEXT) == TOLD
    quoted = '"Is it he?" she said. (He was.) A word\n\n# Chapter II of it\n\nb'
    assert sentences(quoted) == ['"Is it he?"', "# Chapter II of it"]
    assert sentences(quoted, 1) == ['"Is it he?"', "she said.", "(He was.)", "A word", "# Chapter II of it", "b"]


def test_questions_that_are_about_their_sentence():
    text = "The captain of the Grey Heron is Tobias Renner."
    assert is_about(Pair(text, "Who is the captain of the Grey Heron?", "Tobias Renner"))
    assert not is_about(Pair(text, "What is the answer to this question?", "Tobias Renner"))
    assert not is_about(Pair(text, "Who is the captain of the Grey Heron?", "The captain of the Grey Heron"))
    assert not is_about(Pair(text, "Who is it?", "Somebody else"))


def test_names_and_what_is_told_of_them(tokenizer):
    assert names("The Mill of Tobias Renner and of Anne") == ["The Mill of Tobias Renner", "Anne"]
    assert names("Anne went with Captain Ross to Dover.") == ["Captain Ross", "Dover"]
    told = ["She saw Anne at noon.", *(f"The house of Rose was number {n}." for n in range(4))]
    found = module.Examples(tokenizer, module.Template(tokenizer)).by_name(told)  # four sentences have Rose
    assert [tokenizer.decode(x.answer) for x in found] == ["She saw Anne at noon.<|im_end|>"]
    assert "What do you know about Anne?" in tokenizer.decode(found[0].prompt)


def test_batches_hold_every_example_once():
    examples = [Example((), tuple(range(n))) for n in range(1, 20)]
    found = batches(examples, 40, random.Random(0))
    assert sorted(len(x) for batch in found for x in batch) == list(range(1, 20))
    assert sum(40 <= sum(map(len, batch)) < 60 for batch in found) >= len(found) - 1


class TestLearnFrom:
    """One update a row, whatever the loss."""

    def states(self, model, rows):
        rule = runtime_of(model).config.make_rule()
        return {site.index: FastWeights(rows, 16, rule) for site in runtime_of(model).sites}

    def plain(self, weights, ids, function):
        """The loss of a model without fast weights whose projections have these weights, and its gradients."""
        model = tiny(sliding_window=None, max_position_embeddings=512, num_hidden_layers=2).double()
        own = [layer.mlp.down_proj.weight for layer in model.model.layers]
        with torch.no_grad():
            for mine, more in zip(own, weights, strict=True):
                mine += more
        loss = function(model(ids).logits)
        return loss, torch.autograd.grad(loss, own)

    def test_it_is_the_gradient_of_the_weights(self):
        model = reader(update_size=None, clip=1e9)
        states, ids = self.states(model, 2), torch.randint(1, 300, (6, 11))  # three texts for each of two rows
        function = lambda logits: logits[:, :-2].log_softmax(-1)[..., 7].sum()  # noqa: E731
        sums = [[0.0, 0.0], [0.0, 0.0]]
        for _ in range(2):
            want = [
                self.plain([sums[i][row] for i in range(2)], ids[3 * row : 3 * row + 3], function) for row in (0, 1)
            ]
            with torch.inference_mode():
                found = learn_from(runtime_of(model), states, ids, function)
            torch.testing.assert_close(found, want[0][0] + want[1][0])
            for i, row in itertools.product(range(2), range(2)):
                sums[i][row] = sums[i][row] - want[row][1][i]
                torch.testing.assert_close(states[i].S[row], sums[i][row])
        assert states[0].updates == (2, 2)
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_padding_and_other_rows_change_nothing(self):
        model, config = reader(), runtime_of(reader()).config
        some = [Example((5, 6), (7, 8, 9)), Example((), (11, 12, 13, 14, 15, 16))]
        other = [Example((1,), (2, 3))]
        for source in (None, (9, 9, 9, 5, 6)):
            mine = [Example(some[0].prompt, some[0].answer, source), some[1]]
            one, two = self.states(model, 1), self.states(model, 2)
            for _ in range(2):
                learn(model, one, [mine], config)
                learn(model, two, [mine, other], config)
            torch.testing.assert_close(one[1].S[0], two[1].S[0])

    def test_soft_targets_are_the_models_own_with_the_text_before_it(self):
        """Learned to the end, the model alone predicts what it predicts with the text."""
        model = reader()
        example, states = Example((5, 6), (7, 8, 9), (21, 22, 23, 24, 5, 6)), self.states(reader(), 1)
        config = runtime_of(model).config
        losses = [learn(model, states, [[example]], config) for _ in range(30)]
        assert losses[-1] < 0.2 * losses[0]
        again = self.states(model, 1)
        zero = learn(model, again, [[Example((5, 6), (7, 8, 9), (5, 6))]], config)
        assert zero == pytest.approx(0, abs=1e-12)
