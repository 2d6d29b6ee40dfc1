"""The runner takes up what was broken off, pairs what it compares, and the report says what the records say."""

import json
import re

import numpy as np
import pytest
import torch

import inplace_ttt as ittt
from inplace_ttt.eval import paired, plots, report, runner
from inplace_ttt.eval.report import tables, verdicts
from inplace_ttt.eval.runner import Variant, run
from inplace_ttt.eval.suites import Unit


class Fixed:
    """A suite of three units whose figures depend on what the variant says."""

    name = "nll"

    def __init__(self, breaks_at: int | None = None) -> None:
        self.calls: list[str] = []
        self.breaks_at = breaks_at

    def units(self):
        return [Unit(f"window/{d}/{i}", 10) for d in "abcdefgh" for i in range(3)]

    def measure(self, model, unit):
        if self.breaks_at is not None and len(self.calls) == self.breaks_at:
            raise KeyboardInterrupt
        self.calls.append(unit.key)
        _, document, i = unit.key.split("/")
        loss = 40 + ord(document) - ord("a") + 0.1 * int(i) + 10 * model.level
        totals = {"document": document, "domain": "books", "loss_sum": loss, "tokens": 10}
        return [{**totals, "kind": "document"}, {**totals, "kind": "position", "start": 0, "end": 10}]


class Model(torch.nn.Module):
    level = 0.0


class At:
    def __init__(self, model, level):
        self.model, self.level = model, level

    def __enter__(self):
        self.before, self.model.level = self.model.level, self.level

    def __exit__(self, *error):
        self.model.level = self.before


def variants(on=-0.3):
    model = Model()
    return [Variant("on", model, lambda: At(model, on)), Variant("off", model, lambda: At(model, 0.0), updates=False)]


def test_a_run_is_taken_up_where_it_was_broken_off(tmp_path):
    whole = run([Fixed()], variants(), tmp_path / "whole", {"plan": 1})
    with pytest.raises(KeyboardInterrupt):
        run([Fixed(breaks_at=7)], variants(), tmp_path / "cut", {"plan": 1})
    with open(tmp_path / "cut" / runner.RECORDS, "a", encoding="utf-8") as file:
        file.write('{"suite": "nll", "unit": "torn')  # killed while it wrote
    suite = Fixed()
    assert run([suite], variants(), tmp_path / "cut", {"plan": 1}) == whole
    assert len(suite.calls) == 48 - 7
    again = Fixed()
    assert run([again], variants(), tmp_path / "cut", {"plan": 1}) == whole
    assert again.calls == []


def test_another_evaluation_is_not_continued(tmp_path):
    run([Fixed()], variants(), tmp_path, {"length": 10})
    with pytest.raises(ittt.UserError, match="another evaluation"):
        run([Fixed()], variants(), tmp_path, {"length": 20})
    suite = Fixed()
    run([suite], variants(), tmp_path, {"length": 20}, fresh=True)
    assert len(suite.calls) == 48
    (tmp_path / "file").touch()
    with pytest.raises(ittt.UserError, match="is a file"):
        run([Fixed()], variants(), tmp_path / "file", {})


def test_suites_that_need_updates_leave_out_the_others(tmp_path):
    suite = Fixed()
    suite.needs_updates = True
    records = run([suite], variants(), tmp_path, {})
    assert {r["variant"] for r in records} == {"on"}


def test_estimates_against_a_bootstrap_by_hand():
    records = [
        {"document": d, "x": x, "n": n} for d, x, n in [("a", 3.0, 2), ("a", 1.0, 1), ("b", 8.0, 2), ("c", 2.5, 5)]
    ]
    mean = paired.estimate(records, "x", "n")
    assert mean.value == pytest.approx(14.5 / 10)
    drawn = np.random.default_rng(0).integers(0, 3, (paired.RESAMPLES, 3))
    sums, counts = np.array([4.0, 8.0, 2.5]), np.array([3.0, 2.0, 5.0])
    expected = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    assert [mean.low, mean.high] == pytest.approx(expected)


def test_many_documents_are_resampled_in_parts(monkeypatch):
    records = [{"document": f"{i:02}", "x": float(i % 7)} for i in range(50)]
    whole = paired.estimate(records, "x", None)
    monkeypatch.setattr(paired, "DRAWN_AT_ONCE", 170)
    assert paired.estimate(records, "x", None) == whole


def test_differences_are_paired():
    """Documents differ a hundred times more than the variants do: only pairing sees the difference."""
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 10, 20)
    on = [{"document": f"{i}", "x": h - 0.1 + 0.01 * generator.normal()} for i, h in enumerate(hard)]
    off = [{"document": f"{i}", "x": h} for i, h in enumerate(hard)]
    gap = paired.difference(on, off, "x", None)
    assert gap.value == pytest.approx(-0.1, abs=0.01)
    assert -0.12 < gap.low < gap.high < -0.08
    assert paired.difference(on[::-1], off, "x", None) == gap
    with pytest.raises(ValueError, match="different documents"):
        paired.difference(on[1:], off, "x", None)


@pytest.mark.parametrize(("on", "said"), [(-0.3, "updates help, by 0.300"), (0.3, "updates hurt, by 0.300")])
def test_the_verdict_is_what_was_measured(tmp_path, on, said):
    records = run([Fixed()], variants(on), tmp_path, {})
    found = tables(records)
    assert said in verdicts(found)[0]
    row = next(r for r in found["nll by document"] if r["variant"] == "on")
    assert row["value"] == pytest.approx(4.36 + on)
    assert row["difference"] == pytest.approx(on)


def test_no_clear_difference(tmp_path):
    records = run([Fixed()], variants(0.0), tmp_path, {})
    assert "no clear difference" in verdicts(tables(records))[0]


@pytest.mark.parametrize("on", [-0.3, 0.3])
def test_few_documents_give_no_verdict(tmp_path, on):
    """The number of documents is always said; below eight of them the interval is not one to lean on."""
    records = run([Fixed()], variants(on), tmp_path, {})
    enough = verdicts(tables(records))[0]
    assert "by 0.300 nats per token (95% interval 0.300 to 0.300, n = 8)" in enough
    for documents in ("ab", "abcdefg"):
        few = tables([r for r in records if r["document"] in documents])
        (line,) = verdicts(few)
        assert line == (
            f"books: {on:+.3f} nats per token with updates on (95% interval {on:+.3f} to {on:+.3f}, "
            f"n = {len(documents)}): too few documents for a verdict, read at least 8."
        )
        report.write(tmp_path / documents, [r for r in records if r["document"] in documents], {"model": "m"})
        assert "class=better" not in (tmp_path / documents / "report.html").read_text(encoding="utf-8")
    report.write(tmp_path / "all", records, {"model": "m"})
    assert "class=better" in (tmp_path / "all" / "report.html").read_text(encoding="utf-8")


def test_the_report_holds_everything_by_itself(tmp_path):
    plan = {"model": "<tiny> & co", "block": 10}
    records = run([Fixed()], variants(), tmp_path, plan)
    said = report.write(tmp_path, records, plan)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;tiny&gt; &amp; co" in page
    assert all(line in page for line in said)
    assert page.count("<svg") == 2
    assert not re.search(r'(src|href)="https?:', page.replace("http://www.w3.org", ""))
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["tables"] == tables(records)
    rows = (tmp_path / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + sum(map(len, summary["tables"].values()))
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"loss-by-position.png", "differences.png"}


def test_pictures_name_the_model_and_the_measure(tmp_path):
    records = run([Fixed()], variants(), tmp_path, {})
    figures = report.pictures(tables(records), {"model": "tiny", "block": 10})
    assert [figure.get_suptitle() for figure in figures.values()] == [
        "tiny: loss by position", "tiny: loss against updates off, n = 8",
    ]  # fmt: skip


def test_one_document_has_no_interval(tmp_path):
    records = [r for r in run([Fixed()], variants(), tmp_path, {}) if r["document"] == "a"]
    assert "without an interval" in verdicts(tables(records))[0]
    plan = {"model": "m", "block": 10}
    report.write(tmp_path, records, plan)
    assert "NaN" not in (tmp_path / "summary.json").read_text(encoding="utf-8")


def test_panels_say_how_many_documents_they_are_of():
    row = {"domain": "code", "variant": "on", "value": 1.0, "low": 0.5, "high": 1.5, "end": 256, "documents": 9}
    found = plots.curves([row, row | {"end": 512, "documents": 7}, row | {"domain": "books"}], "end")
    assert {title: places for title, (places, _) in found.items()} == {
        "code, n = 7 to 9": [256, 512],
        "books, n = 9": [256],
    }
    gap = {"difference": -0.2, "difference_low": -0.3, "difference_high": -0.1}
    ((_, lines),) = plots.gaps([row, row | {"end": 512} | gap], "end").values()
    assert [(m.value, m.low, m.high) for m in lines["on"]] == [(-0.2, -0.3, -0.1)]
