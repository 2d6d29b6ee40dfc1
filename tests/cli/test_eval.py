"""eval: what it measures is what the library measures; runs are taken up again; mistakes are told in one line."""

import json
import shutil

import pytest
import torch
from eval import local_tasks
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.eval.nll import token_losses

LENGTH = 128


@pytest.fixture(scope="module")
def evaluated(cli, folder, tmp_path_factory, words):
    """Two documents, on, off, a baseline, two other settings, each layer off. Tests leave it as it is."""
    tmp_path = tmp_path_factory.mktemp("evaluated")
    lines = [{"id": name, "text": words[at : at + 1600], "domain": "words"} for name, at in (("a", 0), ("b", 1600))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = (
        "eval", folder.model, "--data", tmp_path / "data.jsonl", "--suite", "nll,diagnostics", "--length", LENGTH,
        "--windows", 2, "--baseline", folder.plain, "--sweep", "lr=0,0.5", "--sweep", "chunk_size=8", "--layers",
        "--out", tmp_path / "out",
    )  # fmt: skip
    return arguments, cli(*arguments), tmp_path / "out"


def rows(out, table: str) -> dict[str, dict]:
    found = json.loads((out / "summary.json").read_text(encoding="utf-8"))["tables"][table]
    return {row["variant"]: row for row in found}


def test_figures_are_the_librarys(evaluated, folder, words):
    _, result, out = evaluated
    assert result.exit_code == 0, result.output
    assert "words: " in result.stdout
    model = ittt.from_pretrained(folder.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.model)
    total = {"on": 0.0, "off": 0.0, "chunk_size=8": 0.0, "without layer 2": 0.0}
    for at in (0, 1600):
        ids = tokenizer(words[at : at + 1600])["input_ids"]
        for i in range(2):
            window = torch.tensor([ids[i * LENGTH : (i + 1) * LENGTH]])
            total["on"] += float(token_losses(model, window).sum())
            with ittt.updates_off(model):
                total["off"] += float(token_losses(model, window).sum())
            with ittt.layers_off(model, [2]):
                total["without layer 2"] += float(token_losses(model, window).sum())
            ittt.configure(model, chunk_size=8)
            total["chunk_size=8"] += float(token_losses(model, window).sum())
            ittt.configure(model, chunk_size=16)
    found = rows(out, "nll by document")
    for label, value in total.items():
        assert found[label]["value"] == pytest.approx(value / (4 * (LENGTH - 1)), rel=1e-5)
    assert set(found) == {*total, "baseline", "lr=0", "lr=0.5", "without layer 0"}
    assert found["lr=0"]["value"] == pytest.approx(found["off"]["value"], rel=1e-6)  # no step, no difference
    assert abs(found["on"]["value"] - found["off"]["value"]) > 1e-3
    assert found["on"]["difference"] == pytest.approx(found["on"]["value"] - found["off"]["value"])


def test_everything_is_written(evaluated):
    _, _, out = evaluated
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "without layer 2" in page
    assert page.count("<svg") == 3
    assert (out / "summary.csv").read_text(encoding="utf-8").startswith("table,")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert {"commit", "date", "hardware", "versions", "seconds", "plan", "verdicts", "tables"} == set(summary)
    assert summary["seconds"].keys() == {"nll", "diagnostics"}
    assert summary["seconds"]["nll"] > 0
    layers = summary["tables"]["fast weights"]
    assert {row["layer"] for row in layers if row["variant"] == "on"} == {0, 2}
    assert {row["layer"] for row in layers if row["variant"] == "without layer 2"} == {0}
    assert all(row["effective_rank"] > 1 for row in layers if row["variant"] == "on")


def test_taken_up_again(evaluated, cli, tmp_path):
    arguments, _, finished = evaluated
    out = shutil.copytree(finished, tmp_path / "out")
    arguments = (*arguments[:-1], out)
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    before = (out / "summary.csv").read_text(encoding="utf-8")
    (out / "records.jsonl").write_text("\n".join(lines[:5]) + '\n{"suite": "nll", "un', encoding="utf-8")
    assert cli(*arguments).exit_code == 0
    after = (out / "summary.csv").read_text(encoding="utf-8")
    assert sorted(before.splitlines()) == sorted(after.splitlines())
    changed = cli(*arguments, "--windows", 1)
    assert changed.exit_code == 2
    assert "another evaluation" in changed.stderr


def test_tasks_of_the_harness_from_local_files(cli, folder, tmp_path):
    """A whole run without a network, and without --data: on and off on the same samples, in the report."""
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    files = local_tasks.write(tmp_path / "tasks")
    arguments = (
        "eval",
        folder.model,
        "--suite",
        "harness",
        "--tasks",
        "local_choice,local_rolling",
        "--task-files",
        files,
    )
    result = cli(*arguments, "--limit", 4, "--batch-size", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "local_choice, acc: " in result.stdout
    found = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))["tables"]["harness"]
    assert {(row["task"], row["metric"], row["variant"]) for row in found} == {
        (task, metric, variant)
        for task, metrics in (
            ("local_choice", ("acc", "acc_norm")),
            ("local_rolling", ("word_perplexity", "bits_per_byte")),
        )
        for metric in metrics
        for variant in ("on", "off")
    }
    assert all(row["documents"] == 4 for row in found)
    assert (tmp_path / "out" / "plots" / "harness.png").exists()
    unknown = cli("eval", folder.model, "--suite", "harness", "--tasks", "ruler_vt", "--out", tmp_path / "other")
    assert unknown.exit_code == 2
    assert "--suite ruler" in unknown.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "--data"),
        (("--suite", "all"), "nll needs it"),
        (("--data", "missing.txt"), "no such file"),
        (("--data", "hf:"), "write hf:DATASET"),
        (("--data", "hf:owner/name@config:train:body"), r"write hf:DATASET\?name=CONFIG&split=SPLIT&text=COLUMN"),
        (("--data", "TEXT", "--suite", "needle", "--depths", "deep"), "--depths deep"),
        (("--data", "TEXT", "--suite", "nll,magic"), "--suite magic"),
        (("--data", "TEXT", "--sweep", "lr"), "--sweep lr"),
        (("--data", "TEXT", "--sweep", "lr=fast"), "not numbers"),
        (("--data", "TEXT", "--sweep", "layers=1"), "--sweep layers=1"),
        (("--data", "TEXT", "--length", "100000"), "100,000 tokens"),
        (("--data", "TEXT", "--lengths", "1k", "--suite", "needle"), "--lengths 1k"),
        (("--data", "TEXT", "--suite", "needle", "--lengths", "512"), "vocabulary|words|--lengths"),
        (("--data", "TEXT", "--baseline", "nowhere"), "nowhere"),
        (("--data", "TEXT", "--length", "128", "--out", "TEXT"), "is a file"),
    ],
)
def test_mistakes(cli, folder, tmp_path, arguments, says):
    given = [folder.text if a == "TEXT" else a for a in arguments]
    out = () if "--out" in given else ("--out", tmp_path / "out")
    result = cli("eval", folder.model, *given, *out)
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    import re

    assert re.search(says, result.stderr)
