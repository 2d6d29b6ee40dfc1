"""lm-evaluation-harness on tiny random models and local task files, with updates on and off."""

import functools
import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract.families import adapted
from eval import local_tasks
from eval.local_tasks import TEXTS
from forked import run_fresh
from session.models import tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.eval.nll import token_losses

pytest.importorskip("lm_eval")

from inplace_ttt.eval import harness, harness_tasks
from inplace_ttt.eval.harness import InPlaceTTTLM, paired, run

FAMILIES = ("llama", "gemma3_text", "gpt2")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks.write(tmp_path_factory.mktemp("tasks"))


def lm(model: Any, **arguments: Any) -> InPlaceTTTLM:
    return InPlaceTTTLM(model, tokenizer(), **arguments)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=a, task_name="local") for a in arguments]


def pairs() -> list[Any]:
    return requests(*[(t, end) for t in TEXTS for end in (" whale", " of the old sea")])


def rolling(model: Any, texts: list[str], **arguments: Any) -> torch.Tensor:
    return torch.tensor(lm(model, **arguments).loglikelihood_rolling(requests(*[(t,) for t in texts])))


def scores(model: Any, asked: list[Any], **arguments: Any) -> torch.Tensor:
    return torch.tensor([score for score, _ in lm(model, **arguments).loglikelihood(asked, disable_tqdm=True)])


def prompts(new: int = 8) -> list[Any]:
    return requests(*[(t, {"until": [], "max_gen_toks": new}) for t in TEXTS])


def with_prefix(string: str) -> torch.Tensor:
    return torch.tensor([[tokenizer().eos_token_id, *tokenizer()(string)["input_ids"]]])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_token_losses(family: str) -> None:
    """In batches of ragged rows, padded at the right: exactly what each text has alone."""
    model = tiny(family)
    expected = torch.tensor([-float(token_losses(model, with_prefix(t)).sum()) for t in TEXTS])
    torch.testing.assert_close(rolling(model, TEXTS, batch_size=3, piece=7), expected, rtol=1e-6, atol=0)
    with ittt.updates_off(model):
        plain = torch.tensor([-float(token_losses(model, with_prefix(t)).sum()) for t in TEXTS])
    torch.testing.assert_close(rolling(model, TEXTS, batch_size=3, updates="off"), plain, rtol=1e-6, atol=0)
    assert (expected - plain).abs().min() > 1e-3
    asked = pairs()
    wanted = []
    for request in asked:
        context, end = request.args
        ids = torch.tensor([tokenizer()(context + end)["input_ids"]])
        n = ids.shape[1] - len(tokenizer()(context)["input_ids"])
        wanted.append(-float(token_losses(model, ids)[0, -n:].sum()))
    torch.testing.assert_close(scores(model, asked, batch_size=4), torch.tensor(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_batches_padding_and_order_change_nothing(family: str) -> None:
    model, asked = tiny(family), pairs()
    alone = scores(model, asked)
    torch.testing.assert_close(scores(model, asked, batch_size=5), alone, rtol=1e-9, atol=0)
    torch.testing.assert_close(scores(model, asked[::-1], batch_size=3).flip(0), alone, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        scores(model, asked, batch_size=len(asked), logits_cache=False), alone, rtol=1e-9, atol=0
    )
    one = lm(model)
    twice = [one.loglikelihood(asked, disable_tqdm=True) for _ in range(2)]
    assert twice[0] == twice[1], "something was left of the first reading"

    generated = lm(model).generate_until(prompts(), disable_tqdm=True)
    assert lm(model, batch_size=5).generate_until(prompts(), disable_tqdm=True) == generated
    assert lm(model, batch_size=2).generate_until(prompts()[::-1], disable_tqdm=True)[::-1] == generated
    for request, found in zip(prompts(), generated, strict=True):
        ids = torch.tensor([tokenizer()(request.args[0])["input_ids"]])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True) == found
    assert lm(model, updates="off").generate_until(prompts(), disable_tqdm=True) != generated


def test_long_texts_in_windows() -> None:
    """Every window scores ``max_length`` tokens behind one token of context and starts from an empty cache."""
    model = tiny("llama")
    ids = with_prefix(TEXTS[2])
    L = 10
    assert ids.shape[1] > 3 * L
    total = -sum(float(token_losses(model, ids[:, at : at + L + 1]).sum()) for at in range(0, ids.shape[1] - 1 - L, L))
    rest = (ids.shape[1] - 1) % L or L
    # The last window is as long as the others; the tokens before the rest are read and not scored.
    total -= float(token_losses(model, ids[:, -L - 1 :])[0, -rest:].sum())
    found = rolling(model, [TEXTS[1], TEXTS[2]], max_length=L, batch_size=4)[1]
    torch.testing.assert_close(found, torch.tensor(total), rtol=1e-6, atol=0)


def test_settings_apply_to_the_harness_alone() -> None:
    model = tiny("llama")
    before = ittt.fast_settings(model)
    off = scores(model, pairs(), updates="off")
    torch.testing.assert_close(scores(model, pairs(), lr=0.0, batch_size=3), off, rtol=1e-12, atol=0)
    for changes in ({"lr": 0.01}, {"chunk_size": 8}, {"decay": 0.5}, {"clip": 0.01}):
        expected = scores(adapted("llama", torch.float64, {"vocab_size": len(tokenizer())}, **changes), pairs())
        found = scores(model, pairs(), **changes)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert (found - scores(model, pairs())).abs().max() > 1e-4
    assert ittt.fast_settings(model) == before
    with ittt.updates_off(model):
        assert (scores(model, pairs(), updates="on") - off).abs().max() > 1e-3
    for wrong in (
        {"updates": "maybe"},
        {"batch_size": "auto"},
        {"piece": 0},
        {"speed": 3},
        {"lr": "fast"},
        {"chunk_size": 0},
    ):
        with pytest.raises(UserError):
            lm(model, **wrong)
    with pytest.raises(UserError, match="tokenizer"):
        InPlaceTTTLM(model)


def test_too_long_a_prompt_is_refused() -> None:
    model = tiny("llama")
    n = len(tokenizer()(TEXTS[2])["input_ids"])
    exact = lm(model, max_length=n + 4)
    asked = requests((TEXTS[1], {"max_gen_toks": 4}), (TEXTS[2], {"max_gen_toks": 4}))
    exact.generate_until(asked, disable_tqdm=True)
    with pytest.raises(UserError, match=rf"{n} tokens and 4 to generate.* at most {n + 3}: set max_length={n + 4}"):
        lm(model, max_length=n + 3).generate_until(asked, disable_tqdm=True)
    pair = requests((TEXTS[2], " whale"))
    whole = len(tokenizer()(TEXTS[2] + " whale")["input_ids"])
    scores(model, pair, max_length=whole - 1)
    with pytest.raises(UserError, match=f"{whole - 1} tokens.*at most {whole - 2}"):
        scores(model, pair, max_length=whole - 2)
    assert lm(model).max_length == 256
    assert lm(tiny("mistral")).max_length == harness.UNLIMITED
    assert lm(tiny("gemma3_text")).max_length == 256


def test_run_is_paired(tasks: Path) -> None:
    names = ["local_choice", "local_generate", "local_rolling"]
    model = tiny("llama")
    records = run(model, tokenizer(), names, include_path=tasks, batch_size=2)
    assert {(r.task, r.metric) for r in records} == {
        ("local_choice", "acc"),
        ("local_choice", "acc_norm"),
        ("local_generate", "exact_match"),
        ("local_rolling", "word_perplexity"),
        ("local_rolling", "bits_per_byte"),
    }
    assert len(records) == 5 * len(TEXTS)
    losses = [r for r in records if r.metric == "word_perplexity"]
    for record, string in zip(sorted(losses, key=lambda r: r.sample), TEXTS, strict=True):
        whole = float(token_losses(model, with_prefix(string)).sum())
        assert record.on == pytest.approx(whole / len(string.split()), rel=1e-6)
        assert record.weight == len(string.split())
        assert record.off is not None
        assert record.off != pytest.approx(whole / len(string.split()), rel=1e-4)
    result = paired(records)["local_rolling", None, "word_perplexity"]
    assert result.samples == len(TEXTS)
    assert result.difference.value == pytest.approx(result.on.value - result.off.value)
    assert result.difference.low <= result.difference.value <= result.difference.high

    zero = run(model, tokenizer(), names, include_path=tasks, batch_size=3, lr=0.0, limit=2)
    assert len(zero) == 5 * 2
    assert all(r.on == pytest.approx(r.off, rel=1e-12) for r in zero)
    alone = run(model, tokenizer(), names[::-1], include_path=tasks, updates=["off"])
    assert {(r.task, r.sample, r.metric): r.off for r in alone} == pytest.approx(
        {(r.task, r.sample, r.metric): r.off for r in records}, rel=1e-9
    )
    assert all(r.on is None for r in alone)


def test_missing_data_and_wrong_names_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    model, tok = tiny("llama"), tokenizer()
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # reading all files takes many seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    with pytest.raises(UserError, match="no task no_such_task"):
        run(model, tok, ["no_such_task"])
    with pytest.raises(UserError, match="ruler_vt: give the lengths"):
        run(model, tok, ["ruler_vt"])
    with pytest.raises(UserError, match="at least 2048 tokens, got 512"):
        run(model, tok, ["ruler_vt"], lengths=[512])

    def offline(*args: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub\nsecond line")

    monkeypatch.setattr(few.func, "load", offline)
    with pytest.raises(
        UserError, match=r"could not load the data of task piqa \(Couldn't reach the Hub\); .*: piqa, mmlu$"
    ):
        run(model, tok, ["piqa", "mmlu"])
    assert len(harness_tasks.RULER) == 13


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    monkeypatch.delitem(sys.modules, "inplace_ttt.eval.harness")
    with pytest.raises(UserError, match=r"pip install 'lm-eval\[ruler\]' accelerate"):
        importlib.import_module("inplace_ttt.eval.harness")
    with pytest.raises(UserError, match=r"pip install 'lm-eval\[ruler\]' accelerate"):
        harness_tasks.load_tasks(["piqa"], "")


def test_ruler_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own needle task, made here at two lengths: as many samples of each, and no more than are read."""
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *args: pytest.fail("downloads"))
    records = run(
        tiny("mistral"), tokenizer(), ["niah_single_1"], lengths=[2048, 2300], limit=1, updates=["on"], chunk_size=512
    )
    assert [(r.length, r.metric, r.on) for r in records] == [(2048, "2048", 0.0), (2300, "2300", 0.0)]


def test_command_line(tasks: Path, tmp_path: Path) -> None:
    """``python -m inplace_ttt.eval.harness`` on a saved model."""
    model = tiny("llama")
    ittt.save_pretrained(model, tmp_path / "model", tokenizer())
    command = ["harness", "--model", "inplace-ttt", "--model_args"]
    command += [f"pretrained={tmp_path / 'model'},updates=off,dtype=float64", "--include_path", str(tasks)]
    command += ["--tasks", "local_rolling", "--output_path", str(tmp_path / "out.json"), "--batch_size", "2"]

    def work() -> None:
        import huggingface_hub.constants
        import lm_eval.tasks

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        few: Any = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # all files take many seconds
        lm_eval.tasks.TaskManager = few
        sys.argv = command
        runpy.run_module("inplace_ttt.eval.harness", run_name="__main__", alter_sys=True)

    code, said = run_fresh(work)
    assert code == 0, said
    (file,) = tmp_path.glob("out*.json")
    result = json.loads(file.read_text())
    words = sum(len(t.split()) for t in TEXTS)
    expected = float(torch.exp(-rolling(model, TEXTS, updates="off").sum() / words))
    assert result["results"]["local_rolling"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-5)
    assert result["config"]["updates"] == "off"
