"""harness and ruler as suites: the same figures as ``run``, in units; RULER from the user's own text and questions."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.families import adapted, plain
from eval import local_tasks
from eval.local_tasks import NAMES, TEXTS
from session.models import tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError

pytest.importorskip("lm_eval")

from inplace_ttt.eval import ruler
from inplace_ttt.eval.harness import run
from inplace_ttt.eval.harness_tasks import RULER, RULER_OFFLINE
from inplace_ttt.eval.report import pictures, tables, verdicts
from inplace_ttt.eval.ruler import RulerData, load_questions
from inplace_ttt.eval.suites import Record
from inplace_ttt.eval.suites import harness as suites
from inplace_ttt.eval.suites.harness import HarnessSuite, harness_suite
from inplace_ttt.eval.suites.nll import NllSuite
from inplace_ttt.eval.suites.ruler import ruler_suite
from inplace_ttt.eval.suites.texts import EvalText, tokenize

SEA = tuple((TEXTS[2] + ". ").split() * 120)
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The captain of ship {i} is called Number{i}. " + "He is old. " * 20,
                    "qas": [
                        {"question": f"Who leads ship {i}?", "answers": [{"text": f"Number{i}"}]},
                        {"question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(12)
            ]
        }
    ]
}
HOTPOT = [{"question": "Where is it?", "answer": "far", "context": [["Ship", ["It is far. "]], ["Sea", ["Wide. "]]]}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return local_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def local(files: Path) -> HarnessSuite:
    return harness_suite(tokenizer(), NAMES, files=files, batch_size=2)


def measured(suite: HarnessSuite, model: Any) -> list[Record]:
    return [record for unit in suite.units() for record in suite.measure(model, unit)]


def values(records: list[Record]) -> dict[tuple[str, str], float]:
    return {(r["document"], r["metric"]): r["value"] / r["weight"] for r in records}


def test_figures_are_those_of_run(local: HarnessSuite, files: Path) -> None:
    model = tiny("llama")
    expected = {
        (f"{r.part}/{r.sample}", r.metric): (r.on, r.off) for r in run(model, tokenizer(), NAMES, include_path=files)
    }
    for number, setting in enumerate(("on", "off")):
        if setting == "on":
            records = measured(local, model)
        else:
            with ittt.updates_off(model):
                records = measured(local, model)
        found = {(document.rpartition("/")[0], metric): value for (document, metric), value in values(records).items()}
        assert found == pytest.approx({key: pair[number] for key, pair in expected.items()}, rel=1e-9)
    assert {r["part"] for r in records} == set(NAMES)


def test_units_cover_every_sample_once(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "SMALLEST", 2)
    pieces = harness_suite(tokenizer(), ["local_rolling"], files=files)
    assert [unit.key for unit in pieces.units()] == ["local_rolling/0", "local_rolling/2", "local_rolling/4"]
    monkeypatch.setattr(suites, "SMALLEST", 32)
    whole = harness_suite(tokenizer(), ["local_rolling"], files=files, batch_size=5)
    (unit,) = whole.units()
    model = tiny("gemma3_text")
    assert values(measured(pieces, model)) == pytest.approx(values(whole.measure(model, unit)), rel=1e-9)
    assert len(harness_suite(tokenizer(), ["local_rolling"], files=files, limit=3)._work["local_rolling/0"][-1]) == 3


def test_loss_of_whole_texts_is_that_of_nll(local: HarnessSuite) -> None:
    model = tiny("llama")
    records = [r for r in measured(local, model) if r["metric"] == "word_perplexity"]
    for number, text in enumerate(TEXTS):
        ids = [tokenizer().eos_token_id, *tokenize(tokenizer(), text)]
        nll = NllSuite([EvalText("d", "sea", np.array(ids, np.int32))], len(ids), contexts=[])
        (unit,) = nll.units()
        (row,) = (row for row in nll.measure(model, unit) if row["kind"] == "document")
        (record,) = (r for r in records if r["document"].startswith(f"local_rolling/{number}/"))
        assert record["value"] == pytest.approx(row["loss_sum"], rel=1e-6)


def test_without_a_step_on_is_off_and_a_plain_model_is_read(local: HarnessSuite) -> None:
    changes = {"vocab_size": len(tokenizer())}
    model = adapted("llama", changes=changes)
    on = values(measured(local, model))
    ittt.set_lr(model, 0.0)
    zero = values(measured(local, model))
    assert zero == pytest.approx(values(measured(local, plain("llama", changes=changes))), rel=1e-9)
    assert zero != pytest.approx(on, rel=1e-4)


def test_tables_and_words(local: HarnessSuite) -> None:
    model = tiny("llama")
    records = [{"suite": "harness", "variant": "on", **r} for r in measured(local, model)]
    with ittt.updates_off(model):
        records += [{"suite": "harness", "variant": "off", **r} for r in measured(local, model)]
    scores = {"task": "niah", "metric": "score", "weight": 1.0}
    for length in (4096, 8192):
        for label, value in (("on", 1.0), ("off", 0.25)):
            records += [
                {"suite": "ruler", "variant": label, "document": f"{i}", "length": length, "value": value, **scores}
                for i in range(3)
            ]
    found = tables(records)
    said = verdicts(found)
    assert any(line.startswith("local_choice, acc: ") for line in said)
    assert "RULER, 8,192 tokens: 1.000 with updates, +0.750 (95% interval +0.750 to +0.750, n = 3)." in said
    row = next(r for r in found["harness"] if r["metric"] == "word_perplexity" and r["variant"] == "on")
    words = sum(len(text.split()) for text in TEXTS)
    assert row["value"] == pytest.approx(
        sum(r["value"] for r in records if r["metric"] == "word_perplexity" and r["variant"] == "on") / words
    )
    assert {"harness", "ruler"} <= pictures(found, {"model": "m"}).keys()


# -- RULER ------------------------------------------------------------------------------------------------------------


def test_needle_settings_are_the_harnesss(monkeypatch: pytest.MonkeyPatch) -> None:
    with ruler._silent():
        from lm_eval.tasks.ruler import niah_utils
    monkeypatch.setattr(niah_utils, "get_haystack", lambda type_haystack: type_haystack)
    monkeypatch.setattr(niah_utils, "get_tokenizer", lambda name: None)
    monkeypatch.setattr(niah_utils, "generate_samples", lambda haystack, **settings: [settings])
    monkeypatch.setattr(niah_utils, "download_dataset", lambda rows: next(iter(rows))[0])
    assert len(ruler.NIAH) == 8
    for task, settings in ruler.NIAH.items():
        stock = getattr(niah_utils, task)(max_seq_lengths=[4096])
        own = {"max_seq_length": 4096, "template": niah_utils.TEMPLATE, "num_samples": 500, "TOKENIZER": None}
        assert stock == {**own, **settings}


def test_all_thirteen_from_text_and_questions(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    (tmp_path / "hotpot.json").write_text(json.dumps(HOTPOT))
    data = RulerData(SEA, dict(load_questions(tmp_path / name) for name in ("squad.json", "hotpot.json")))
    made = [ruler_suite(tokenizer(), [2048], data, limit=2) for _ in range(2)]
    assert {key.split("/")[0] for key in made[0]._work} == set(RULER)
    texts = [{key: [doc["input"] for doc in work[2].eval_docs] for key, work in suite._work.items()} for suite in made]
    assert texts[0] == texts[1], "the same ones every time, so that a run can be taken up again"
    for name, limit in (("niah_multiquery", 2), ("ruler_qa_squad", 2), ("ruler_qa_hotpot", 1), ("ruler_vt", 2)):
        assert len(texts[0][f"{name}/2048/0"]) == limit
    assert TEXTS[2] in texts[0]["niah_single_2/2048/0"][0]
    for i, prompt in enumerate(texts[0]["ruler_qa_squad/2048/0"]):
        assert f"The captain of ship {i} is called Number{i}" in prompt
        assert prompt.endswith(f"Who leads ship {i}?")


def test_what_needs_a_download_is_left_out_and_said() -> None:
    empty = RulerData()
    assert [task for task in RULER if not empty.needs_download(task)] == list(RULER_OFFLINE)
    assert empty.needs_download("niah_multivalue") == "running text: --data"
    assert empty.needs_download("ruler_qa_hotpot") == "questions: --questions with a HotpotQA file"
    assert ruler.config("niah_multivalue", empty, 5) == "niah_multivalue"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    with pytest.raises(UserError, match=r"wonderwords: pip install 'lm-eval\[ruler\]' accelerate"):
        ruler.config("ruler_vt", RulerData(), 1)


def test_too_long_or_too_little_is_refused() -> None:
    with pytest.raises(UserError, match="reads at most 256 tokens, and no text is cut"):
        ruler_suite(tokenizer(), [2048], RulerData(), longest=256, limit=1)
    squad = RulerData(questions={"ruler_qa_squad": ruler._squad(SQUAD)})
    with pytest.raises(
        UserError, match=r"--lengths 2048: \w+ has a text of 2,\d+ tokens, the model reads at most 2,048"
    ):
        ruler_suite(tokenizer(), [2048], squad, longest=2048, limit=4)
    with pytest.raises(UserError, match=r"fills .* of 2,048 tokens only"):
        ruler.make("niah_single_2", RulerData(SEA[:100]), 1, tokenizer=str(ittt.DEFAULT_MODEL), max_seq_lengths=[2048])
    with pytest.raises(UserError, match="--suite ruler"):
        harness_suite(tokenizer(), ["ruler_vt"])
    with pytest.raises(UserError, match="no such directory"):
        harness_suite(tokenizer(), ["local_rolling"], files=Path("nowhere"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.json", None, "no such file"),
        ("q.json", "{", "not JSON"),
        ("q.json", "{}", "no questions in it"),
        ("q.json", "[]", "no questions in it"),
        ("q.jsonl", '{"question": "Who?"}', "no questions in it"),
        ("q.json", '{"data": [{"paragraphs": []}]}', "no questions in it"),
    ],
)
def test_questions_that_are_none(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        load_questions(tmp_path / name)


def test_questions_in_lines(tmp_path: Path) -> None:
    lines = [{"question": f"{i}?", "answers": ["a", "b"], "context": f"text {i % 2}"} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task, found = load_questions(tmp_path / "q.jsonl")
    assert task == "ruler_qa_squad"
    assert found.paragraphs == ["text 0", "text 1"]
    assert found.questions[1] == {"query": "1?", "outputs": ["a", "b"], "context": [1], "more_context": []}
