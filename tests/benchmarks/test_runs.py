"""Many runs from one table: what a record holds, what a failure leaves, what is run again, when the queue ends."""

import argparse
import copy
import json
import lzma
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import Forked
from locations import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import measure_trained
import reading_by_loss
import runs
import summarise_runs
from session.models import tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt.errors import UserError
from inplace_ttt.hf.attach import runtime_of

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re") for b in ("ne", "so", "fi", "ba")]


def text(seed: int, words: int) -> str:
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words)) + ".\n"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control, a variant and two that fail: two-layer models from scratch, six steps of two rows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TINY_BOOKS", str(tmp_path))
    with lzma.open(tmp_path / "books.jsonl.xz", "wt", encoding="utf-8") as file:
        for seed in range(2):
            file.write(json.dumps({"id": f"book {seed}", "text": text(seed, 6000)}) + "\n")
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"text": text(seed, 4000)}) + "\n" for seed in range(10, 13)), encoding="utf-8"
    )
    ruler = [
        {"task": task, "length": 128, "prompt": text(seed, 20), "outputs": ["ne"], "tokens": 3}
        for task in ("niah_single_1", "ruler_fwe")
        for seed in range(3)
    ]
    (tmp_path / "ruler.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ruler), encoding="utf-8")
    recipe = {
        "name": "tiny", "output": str(tmp_path / "unused"), "sequence_length": 128, "steps": 6, "batch_size": 2,
        "model": {"config": {
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
            "max_position_embeddings": 512,
        }},
        "tokenizer": "src/inplace_ttt/models/books-and-code",
        "ttt": {"layers": "0::1", "chunk_size": 32, "lr": 0.1},
        "data": {"train": {"text": f"jsonl:{tmp_path / 'train.jsonl'}"}, "cache": str(tmp_path / "tokens")},
        "optimizer": {"lr": 1e-3}, "log_every": 2,
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    evaluation = {
        "books": ["${TINY_BOOKS}/books.jsonl.xz"], "tokens": 192, "documents": 2,
        "ruler": str(tmp_path / "ruler.jsonl"), "ruler_texts": 2,
        "contexts": [64, 128], "speed": 96,
        "needle": {"lengths": [128], "depths": [0.5], "kinds": ["single"], "trials": 2, "mentions": 2},
        "mqar": {"lengths": [128], "pairs": [4], "trials": 2},
        "reading": {"layers": "0::1", "chunk_size": 32, "update_size": 0.001},
    }  # fmt: skip
    values = {
        "settings": {"cut_multiple": 1},
        "evaluation": evaluation,
        "runs": {
            name: {"recipe": str(tmp_path / "tiny.yaml"), "settings": settings}
            for name, settings in (
                ("control", {"ttt": None}),
                ("paper", {"optimizer.lr": 3e-3}),
                ("wild", {"optimizer.max_grad_norm": 0.0, "ttt.lr": 1e30}),
                ("stuck", {"ttt.lr": 1e30}),
            )
        },
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Copied(Forked):
    """A process of the queue, as a copy of this one."""

    def __init__(self, command: list[str], env: dict[str, str], stdout: Any, stderr: int) -> None:
        def work() -> None:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            os.environ.update(env)
            sys.argv = command[1:]
            runs.main()

        super().__init__(work)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_table_becomes_records_tables_and_pictures(
    table: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, with a process of its own for the variant (the control has a record already); then the summary."""
    real: Any = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **k: (Copied if "--one" in command else real)(command, **k)
    )
    out = tmp_path / "out"
    arguments = ["runs.py", str(table), "--out", str(out), "--scratch", str(tmp_path / "scratch")]
    (plain,) = [run for run in runs.read_table(table) if run.name == "control"]
    assert runs.do(plain, out, tmp_path / "scratch")
    capfd.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--only", "control", "paper"])
        with pytest.raises(SystemExit) as ended:
            runs.main()
    assert ended.value.code == 0, (out / "paper" / "log.txt").read_text()
    control, paper = (load(out / name / "run.json") for name in ("control", "paper"))
    for record in (control, paper):
        assert record["failed"] is None
        assert record["evaluation"]["failed"] == {}
        assert record["tokens_seen"] == 6 * 2 * 128
        assert [entry["step"] for entry in record["curve"]] == [2, 4, 6]
        assert record["tokens_per_second"] > 0
        assert {"commit", "date", "hardware", "versions"} <= record.keys()
    assert control["data"] == paper["data"]
    assert "${TINY_BOOKS}" in paper["evaluation"]["settings"]["books"][0]
    assert str(tmp_path / "scratch") not in json.dumps(paper["recipe_as_run"])
    assert control["recipe_as_run"]["ttt"] is None
    assert paper["recipe_as_run"]["optimizer"]["lr"] == 3e-3
    assert any(name.startswith("state_norm/") for name in paper["curve"][-1])
    assert not (out / "paper" / "train").exists(), "models go where --scratch says"

    measured = paper["evaluation"]
    for domain in ("books", "code"):
        row = measured["losses"][domain]
        assert row["gain"] == pytest.approx(row["off"] - row["on"], abs=1e-5)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
        assert len(row["on_by_document"]) == len(row["off_by_document"]) == 2
        assert row["positions"] == [0]
        assert row["on_by_position"] == [pytest.approx(row["on"], abs=1e-5)]
        assert [layer["layer"] for layer in row["sizes"]] == [0, 1]
        assert all(layer["output_change"] > 0 for layer in row["sizes"])
        assert "off" not in control["evaluation"]["losses"][domain]
        assert control["evaluation"]["reading"][domain]["off"] == pytest.approx(
            control["evaluation"]["losses"][domain]["on"], abs=1e-4
        )
    assert [row["context"] for row in measured["recall"]["nll by sliding"] if row["variant"] == "on"] == [64, 128]
    more = measured["speed"]["cache_bytes"] - control["evaluation"]["speed"]["cache_bytes"]
    state, pending = 2 * 32 * 64 * 4, 2 * 32 * (64 + 32) * 4  # two layers: S, and a chunk's z and u
    assert state + pending <= more <= 2 * (state + pending), "S, S folded into W0, and pending tokens"
    for name in ("needle", "recall"):
        assert {row["variant"] for row in measured["recall"][name]} == {"on", "off"}
        assert {row["variant"] for row in control["evaluation"]["recall"][name]} == {"on"}
    assert {row["task"] for row in measured["ruler"]} == {"all", "niah_single_1", "ruler_fwe"}
    assert all(row["documents"] == (4 if row["task"] == "all" else 2) for row in measured["ruler"])

    said = capfd.readouterr().out
    assert "have a record: control\n" in said
    assert "paper: begins" in said
    assert f"paper: books {measured['losses']['books']['on']:.4f} (off " in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*arguments, "--only", "control", "paper"])
        with pytest.raises(SystemExit) as ended:
            runs.main()
    assert ended.value.code == 0
    assert "have a record: control paper" in capfd.readouterr().out

    found = summarise_runs.table([control, paper])
    gain = measured["losses"]["books"]["gain"]
    assert f"| {gain:+.3f} " in found
    versus = control["evaluation"]["losses"]["books"]["on"] - measured["losses"]["books"]["on"]
    assert f"{versus:+.3f} (" in found
    summarise_runs.draw([control, paper], tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_leaves_a_record_that_says_so(table: Path, tmp_path: Path) -> None:
    (wild,) = [run for run in runs.read_table(table) if run.name == "wild"]
    log = tmp_path / "wild" / "log.txt"
    log.parent.mkdir()
    log.write_text("step      2  loss 9.0123  gradient 1.000  lr 1.00e-03  1,234 tokens/s\n")
    assert runs.do(wild, tmp_path, tmp_path) is False
    record = load(tmp_path / "wild" / "run.json")
    assert "the loss is nan" in record["failed"]
    assert record["curve"] == [{"step": 2, "loss": 9.0123, "tokens_per_second": 1234.0}]
    assert "evaluation" not in record


def test_a_run_whose_gradients_overflow_counts_as_failed(table: Path, tmp_path: Path) -> None:
    """Its loss stays finite, because every step is scaled to nothing."""
    (stuck,) = [run for run in runs.read_table(table) if run.name == "stuck"]
    assert runs.do(stuck, tmp_path, tmp_path) is False
    record = load(tmp_path / "stuck" / "run.json")
    assert record["failed"] == "the gradient was not finite in 3 of 3 logged steps: such steps change nothing"
    assert [entry["grad_norm"] for entry in record["curve"]] == [None] * 3


# -- the queue, with small programs in place of trainings --------------------------------------------------------------


def queue(
    tmp_path: Path,
    programs: dict[str, str],
    costs: dict[str, float],
    seconds: float = 60,
    slots: int = 1,
    beside: int = 1,
) -> Any:
    given = argparse.Namespace(
        out=tmp_path, scratch=tmp_path, table=tmp_path / "table.yaml", seconds=seconds, beside=beside
    )
    waiting = [(runs.Run("recipe", name=name), costs[name]) for name in programs]

    class Small(runs.Queue):
        def command(self, run: runs.Run) -> list[str]:
            record = {"failed": None, "evaluation": {"losses": {}}}
            say = f"import json, pathlib, sys, time; out = pathlib.Path({str(tmp_path / run.name / 'run.json')!r})\n"
            done = f"out.write_text(json.dumps({record!r}))"
            return [sys.executable, "-S", "-c", say + programs[run.name].replace("DONE", done)]

    return Small(waiting, given, slots)


def test_the_longest_begin_first_and_a_failure_stops_no_other(tmp_path: Path, capsys: Any) -> None:
    programs = {"short": "DONE", "killed": "sys.exit(9)", "long": "DONE"}
    found = queue(tmp_path, programs, {"short": 1, "killed": 2, "long": 3})
    found.work()
    begun = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "begins" in line]
    assert begun == ["long", "killed", "short"]
    assert found.failed == ["killed"]
    assert load(tmp_path / "killed" / "run.json")["failed"] == "ended with status 9"
    assert load(tmp_path / "short" / "run.json")["failed"] is None


@pytest.mark.parametrize("beside", [1, 2])
def test_slots_work_side_by_side_each_on_its_gpu(beside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    names = "abcd"[: 2 * beside]
    wait = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n"
    wait += f"while not all((out.parents[1] / name / 'log.txt').exists() for name in {names!r}): time.sleep(0.01)\nDONE"
    programs, costs = dict.fromkeys(names, wait), {name: 4 - names.index(name) for name in names}
    found = queue(tmp_path, programs, costs, slots=2 * beside, beside=beside)
    found.work()
    assert [(tmp_path / name / "log.txt").read_text().strip() for name in names] == ["4", "7"] * beside


def test_the_end_of_the_time_ends_what_runs_without_a_record(tmp_path: Path, capsys: Any) -> None:
    found = queue(tmp_path, {"first": "time.sleep(60)", "second": "DONE"}, {"first": 2, "second": 1}, seconds=1)
    begun = time.perf_counter()
    found.work()
    assert time.perf_counter() - begun < 20
    assert not (tmp_path / "first" / "run.json").exists()
    said = capsys.readouterr().out
    assert "first: ended" in said
    assert "not begun: second" in said


def test_what_would_not_fit_does_not_begin(tmp_path: Path, capsys: Any) -> None:
    """By the time that the one before took, seven thousand times as long is too long and one hundredth is not."""
    programs = {"first": "time.sleep(0.3)\nDONE", "long": "DONE", "short": "DONE"}
    found = queue(tmp_path, programs, {"first": 1, "long": 7000, "short": 0.01}, seconds=30)
    found.waiting.sort(key=lambda pair: pair[0].name)  # the short one first measured
    found.work()
    said = capsys.readouterr().out
    assert "not begun: long" in said
    assert "short: begins" in said


def test_runs_that_share_a_device_train_one_after_the_other(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training: list[str] = []

    def train(recipe: Any, console: Any) -> None:
        training.append("begins")
        time.sleep(0.1)
        training.append("ends")
        raise UserError("this is all")

    monkeypatch.setattr(runs, "train", train)
    found = [run for run in runs.read_table(table) if run.name in ("control", "paper")]
    for run in found:
        (tmp_path / run.name).mkdir()
    threads = [threading.Thread(target=runs.do, args=(run, tmp_path, tmp_path / "scratch", 2)) for run in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert training == ["begins", "ends"] * 2


# -- the summary -------------------------------------------------------------------------------------------------------


def record(name: str, on: list[float], off: list[float] | None = None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"on": sum(on) / len(on), "on_by_document": on}
    if off is not None:
        row |= {"off": sum(off) / len(off), "off_by_document": off, "gain": sum(off) / len(off) - row["on"]}
    seed = int(name[-1]) if "-seed" in name else 0
    run = {"name": name, "failed": None, "tokens_seen": 5, "data": {"train": {}}, "curve": [], "tokens_per_second": 7.0}
    run |= {"recipe_as_run": {"model": {"base": None}, "seed": seed}, "evaluation": {"losses": {"books": row}}}
    return run | more


def test_a_run_is_compared_with_the_control_of_its_seed_and_rows() -> None:
    records = [
        record("window-seed0", [3.0, 3.2]), record("window-seed1", [3.1, 3.3]), record("window-gla-seed0", [2.9, 3.0]),
        record("ttt-seed0", [2.8, 3.0], [2.9, 3.2]), record("ttt-seed1", [2.8, 3.0], [3.0, 3.2]),
        record("other", [1.0, 1.0], tokens_seen=6), record("broken", [1.0], failed="the loss is nan at step 3"),
        record("adapter", [2.0, 2.0], [2.5, 2.5]),
    ]  # fmt: skip
    records[3]["evaluation"]["losses"]["books"]["own_gain"] = 0.04
    records[-1]["recipe_as_run"]["trainable"] = "adapter"
    lines = summarise_runs.table(records, "window").splitlines()
    cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert cells["ttt-seed0"][1:4] == ["2.9000", "3.0500", "+0.150 (+0.100 to +0.200)"]
    assert cells["ttt-seed0"][4:6] == ["+0.040", "+0.200 (+0.200 to +0.200)"]
    assert cells["ttt-seed1"][5] == "+0.300 (+0.300 to +0.300)"
    assert cells["window-gla-seed0"][5] == "+0.150 (+0.100 to +0.200)"
    assert cells["window-seed0"][3:6] == cells["other"][3:6] == [""] * 3, "no updates; no control of that budget"
    assert cells["adapter"][3:6] == ["+0.500 (+0.500 to +0.500)", "", ""], "its base is its control"
    assert lines[-1] == "* broken failed: the loss is nan at step 3"
    seeds = summarise_runs.over_seeds(records, "window").splitlines()
    (line,) = [line for line in seeds if line.startswith("| ttt ")]
    assert line.split(" | ")[1:5] == [
        "2", "2.9000 (2.9000 to 2.9000)", "+0.175 (+0.150 to +0.200)", "+0.250 (+0.200 to +0.300)",
    ]  # fmt: skip
    assert summarise_runs.over_seeds([records[0]], "window") == ""


def test_the_summary_of_some_variants_has_them_and_their_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in (record("window-seed0", [3.0]), record("ttt-seed0", [2.8], [2.9]), record("chunk-64-seed0", [2.5])):
        (tmp_path / one["name"]).mkdir()
        (tmp_path / one["name"] / "run.json").write_text(json.dumps(one))
    monkeypatch.setattr(sys, "argv", ["summarise_runs.py", str(tmp_path), "--control", "window", "--only", "chunk-*"])
    summarise_runs.main()
    names = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["| variant", "| ---", "| window-seed0", "| chunk-64-seed0"]


def test_rows_are_in_the_order_of_the_patterns_then_of_numbers(tmp_path: Path) -> None:
    for name in ("chunk-64", "chunk-512", "layers-7", "window", "chunk-128", "window-gla"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record(name, [3.0])))
    records = summarise_runs.read(tmp_path, "window")
    names = [r["name"] for r in summarise_runs.chosen(records, ["layers-*", "*-*"], "window")]
    assert names == ["window", "layers-7", "chunk-64", "chunk-128", "chunk-512", "window-gla"]


def test_a_picture_has_the_panels_that_two_variants_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(summarise_runs, "save", lambda figure, path: figures.append(figure))
    curve = [{"tokens": n, "ttt_cosine": n / 10} for n in range(8)]
    records = [
        record("window-seed0", [3.0, 3.2]), record("window-seed1", [3.0, 3.4]),
        record("ttt-seed0", [2.8, 3.0], [2.9, 3.2], curve=curve), record("ttt-seed1", [2.7, 2.9], [2.9, 3.2]),
        record("gla-seed0", [3.1, 3.1]),
    ]  # fmt: skip
    path = tmp_path / "replica.png"
    summarise_runs.draw(records, path, "window")
    summarise_runs.draw([*records, record("chunk-64", [2.8, 3.0], [2.9, 3.0], curve=curve[:4])], path, "window")
    one, three = ([axis.get_title(loc="left") for axis in figure.axes] for figure in figures)
    assert one == ["window - variant"]
    assert three == ["updates off - on", "window - variant", "cosine of v and -dL/do"]
    points = figures[0].axes[0].containers[0].lines[0].get_xydata().tolist()
    assert points == [[pytest.approx(0.3), -0.15], [pytest.approx(0.0), 0.85]]
    early, late = (line.lines[0].get_xdata().tolist() for line in figures[1].axes[2].containers)
    assert early == [pytest.approx(0.25), pytest.approx(0.1)]
    assert late == [pytest.approx(0.65), pytest.approx(0.3)]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["books, n = 2"]
    assert [text.get_text() for text in figures[0].axes[0].get_yticklabels()] == ["ttt, 2 seeds", "gla"]


def test_losses_by_context_are_those_of_books_with_updates_over_seeds(tmp_path: Path) -> None:
    def sliding(values: dict[tuple[str, str, int], float]) -> dict[str, Any]:
        rows = [
            {"domain": d, "variant": v, "context": n, "value": x, "documents": 7} for (d, v, n), x in values.items()
        ]
        return {"losses": {}, "recall": {"nll by sliding": rows}}

    records = [
        record("ttt-seed0", [1.0], evaluation=sliding({("prose", "on", 1024): 3.0, ("prose", "off", 1024): 9.0})),
        record("ttt-seed1", [1.0], evaluation=sliding({("prose", "on", 1024): 4.0, ("code", "on", 1024): 9.0})),
        record("window-seed0", [1.0], evaluation=sliding({("prose", "on", 2048): 5.0})),
        record("other", [1.0]),
        record("broken", [1.0], failed="the loss is nan at step 3"),
    ]
    lines = summarise_runs.context_table(records).splitlines()
    assert lines[0] == "| variant | 1,024 | 2,048 |"
    assert lines[2:] == ["| ttt | 3.500 |  |", "| window |  | 5.000 |"]
    assert summarise_runs.context_table(records[3:]) == ""
    summarise_runs.draw_contexts(records, tmp_path / "contexts.png")
    assert (tmp_path / "contexts.png").read_bytes()[:4] == b"\x89PNG"


# -- measurements ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings"), [("llama", {}), ("gemma3_text", {}), ("llama", {"objective": "next_error"})]
)
def test_prompts_side_by_side_are_answered_as_alone(family: str, settings: dict[str, Any]) -> None:
    model, prompts = tiny(family, chunk_size=8, **settings), [text(seed, 10 + 7 * seed) for seed in range(3)]
    batch = [{"prompt": prompt, "tokens": 5 + i} for i, prompt in enumerate(prompts)]
    together = measure_trained.generate(model, tokenizer(), batch)
    assert together == [measure_trained.generate(model, tokenizer(), [line])[0] for line in batch]
    with ittt.updates_off(model):
        assert together != measure_trained.generate(model, tokenizer(), batch)
    assert len({len(answer) for answer in together}) > 1


def test_what_fails_after_the_losses_stops_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    settings = {"tokens": 64, "documents": 2, "needle": None, "ruler": str(tmp_path / "none"), "mqar": None}
    found = measure_trained.measure_trained(tmp_path, settings, lambda line: None)
    assert found["losses"]["code"]["off"] > 0
    assert list(found["failed"]) == ["ruler"]
    monkeypatch.setattr(measure_trained, "losses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_trained.measure_trained(tmp_path, settings, lambda line: None)


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_every_run_of_the_smollm2_table_can_be_run(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are right, and all runs of one base read the same rows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("INPLACE_TTT_DATA", str(shared / "data"))
    monkeypatch.setenv("INPLACE_TTT_CODE", str(tmp_path))
    (tmp_path / "train.jsonl").touch()
    found = {run.name: run.checked(tmp_path) for run in runs.read_table(ROOT / "benchmarks" / "smollm2.yaml")}
    assert len(found) > 25
    (again,) = runs.read_table(ROOT / "benchmarks" / "smollm2.yaml", ["ttt.chunk_size=512", "seed=3"])[:1]
    assert again.checked(tmp_path).ttt is None
    assert again.checked(tmp_path).seed == 3
    for name in ("window", "full"):
        control = found[f"control-{name}"]
        assert control.ttt is None
        alike = [recipe for recipe in found.values() if recipe.model == control.model]
        assert len(alike) > 2
        for recipe in alike:
            assert (recipe.data, recipe.tokenizer, recipe.seed) == (control.data, control.tokenizer, control.seed)
            assert (recipe.steps, recipe.tokens_per_step, recipe.batch_size) == (600, 65536, 8)
            assert recipe.cut_multiple == 1, "else the chunk size decides where documents are cut"


def test_seeds_make_runs_of_their_own(table: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(table.read_text())
    values["seeds"] = [0, 4]
    values["runs"]["paper"]["seeds"] = [1]
    table.write_text(yaml.safe_dump(values | {"imports": ["peers"]}))
    found = {run.name: run.checked(tmp_path).seed for run in runs.read_table(table)}
    assert {name: seed for name, seed in found.items() if name.startswith(("control", "paper"))} == {
        "control-seed0": 0, "control-seed4": 4, "paper-seed1": 1,
    }  # fmt: skip


def test_mistakes_are_told_in_a_line_before_anything_runs(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["runs.py", str(table), "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(UserError) as error:
            runs.main()
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 2)
        assert main("--only", "control", "--gpus", "3") == "--gpus 3: this machine has 2"
    assert "has no such run, only control, paper, stuck, wild" in main("--only", "papr")
    values = yaml.safe_load(table.read_text())
    table.write_text(yaml.safe_dump(values | {"run": {}}))
    assert "run: no such setting, did you mean runs?" in main()
    values["runs"]["paper"]["settings"]["ttt.chunk"] = 5
    table.write_text(yaml.safe_dump(values))
    assert "ttt.chunk: no such setting" in main()
    assert "'steps': write key=value" in main("--set", "steps")
    assert "stepps: no such setting" in main("--only", "control", "--set", "stepps=2")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"evaluation\.token: no such setting"):
        measure_trained.measure_trained(tmp_path, {"token": 5}, print)


@pytest.mark.parametrize("objective", ["next_token", "loss"])
def test_own_gain_is_over_the_weights_that_another_text_left(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, a row is read as by a plain model whose weights are W0 + lr S of the row before it."""
    monkeypatch.setattr(reading_by_loss, "PIECE", 20)
    settings: Any = {"update_size": 0.05} if objective == "loss" else {"target": "hidden_states"}
    model = tiny("llama", chunk_size=8, objective=objective, **settings).double()
    for site in runtime_of(model).sites:
        if objective == "next_token":
            torch.nn.init.normal_(site.mlp.ttt_proj.weight, std=0.5)
    ids = torch.randint(1, 200, (3, 64), generator=torch.Generator().manual_seed(0))
    _, cache = reading_by_loss.read(model, ids)
    states = {i: fast.S for i, fast in ittt.fast_weights(cache).items()}
    found = reading_by_loss.own_gain(model, ids, cache)
    wanted = []
    for row in range(3):
        plain = copy.deepcopy(model)
        lr = runtime_of(plain).config.lr
        for site in runtime_of(plain).sites:
            site.projection().weight.data += lr * states[site.index][row - 1]
        with ittt.updates_off(plain):
            wanted.append(float(reading_by_loss.read(plain, ids[row : row + 1])[0].mean()))
    assert found["after_another_stopped"] == pytest.approx(sum(wanted) / 3, abs=1e-6)
    assert found["own_gain"] == pytest.approx(found["after_another_stopped"] - found["after_another"], abs=1e-6)
    assert abs(found["own_gain"]) > 1e-4
    assert runtime_of(model).config.chunk_size == 8
    if objective != "loss":
        with pytest.raises(UserError, match="multiple of the chunk size, 8"):
            reading_by_loss.own_gain(model, ids[:, :60], cache)
