"""The plan's formulas against recorded runs, and the commands of docs/training.md."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from locations import ROOT
from torch.distributed.run import get_args_parser as torchrun_parser
from typer.testing import CliRunner

from inplace_ttt.cli import app
from inplace_ttt.train.loss import tokens_at_once
from inplace_ttt.train.plan import Plan, plan
from inplace_ttt.train.recipe import make_recipe

RECORDS = ROOT / "benchmarks" / "results" / "books-and-code"
PAGE = (ROOT / "docs/training.md").read_text()
COMMANDS = re.findall(r"^    inplace-ttt (train recipes/.+)$", PAGE, re.MULTILINE)
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
DRY = """
srun() { "$@"; }
scontrol() { echo node0; }
torchrun() { printf '%s\\n' torchrun "$@" ''; }
accelerate() { printf '%s\\n' accelerate "$@" ''; }
"""
"""Commands that print what they were given, a line an argument, and an empty line."""


@pytest.fixture(autouse=True)
def _data(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("prose_train_0", "prose_validation", "prose_test"):
        (corpus / f"{name}.jsonl.xz").touch()
    for name in ("validation", "test"):
        (corpus / f"{name}.jsonl").touch()
    (corpus / "tiny").mkdir(exist_ok=True)
    for name in ("train", "validation"):
        (corpus / "tiny" / f"{name}.jsonl.xz").touch()
    for name in ("INPLACE_TTT_DATA", "INPLACE_TTT_CODE"):
        monkeypatch.setenv(name, str(corpus))


def test_targets_and_rules_are_planned(values: dict[str, Any]) -> None:
    """A second matrix of a target, a second tensor of a rule, and the values that are taught."""
    D, layers = 32, 2
    ttt = {"layers": "0::1", "chunk_size": 16}
    one, error, norms, taught = (
        plan(make_recipe(values | {"ttt": ttt | more, "teach": weight, "teach_alone": weight > 0}))
        for more, weight in (
            ({"objective": "next_token"}, 0.0),
            ({"objective": "next_error"}, 0.0),
            ({"objective": "next_token", "rule": "norm_preserving"}, 0.0),
            ({"objective": "next_token"}, 1.0),
        )
    )
    assert error.trained == one.trained + layers * D * D
    assert norms.memory["fast weights"] == 2 * one.memory["fast weights"]
    assert taught.memory["activations"] > one.memory["activations"]


TRAINED = [*RECORDS.glob("*/run.json"), *(ROOT / "benchmarks" / "results" / "adapter").glob("*/run.json")]
GPUS = {"NVIDIA H200": (989, 4.8)}
"""TFLOP/s in bf16 and TB/s by the data sheet."""


def seconds(planned: Plan, record: dict[str, Any]) -> float:
    """Of a token of all processes together, on the record's GPU."""
    gpu = record["hardware"] if isinstance(record["hardware"], str) else record["hardware"]["gpus"][0]
    return planned.seconds_per_token(*GPUS[gpu]) / planned.processes


PLANNED = sorted((ROOT / "benchmarks" / "results" / "plan").glob("*.json"))


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.parent.name)
def test_memory_is_within_a_fifth_of_recorded_runs(path: Path, corpus: Path) -> None:
    record = json.loads(path.read_text())
    text = {"text": f"jsonl:{corpus / 'train.jsonl'}"}  # other text than the records', of which a plan reads nothing
    recipe = make_recipe(record["recipe"] | {"data": {"train": text, "validation": text}})
    planned = plan(recipe, logit_tokens=recipe.batch_size * recipe.sequence_length)  # those runs made whole logits
    assert planned.total == pytest.approx(record["peak_memory_bytes"], rel=0.2)
    assert planned.tokens == record["tokens_seen"]


@pytest.mark.parametrize("path", PLANNED, ids=lambda path: path.stem)
def test_memory_is_within_a_fifth_of_recorded_steps(path: Path, corpus: Path) -> None:
    record = json.loads(path.read_text())
    planned = plan(make_recipe(record["recipe"] | {"data": {"train": {"text": f"jsonl:{corpus / 'train.jsonl'}"}}}))
    assert planned.total == pytest.approx(record["measured_bytes"], rel=0.2)
    assert seconds(planned, record) == pytest.approx(1 / record["tokens_per_second"], rel=0.2)


SEVERAL = {
    path.stem: record
    for path in sorted((ROOT / "benchmarks" / "results" / "distributed").glob("*.json"))
    if (record := json.loads(path.read_text()))
}


@pytest.mark.parametrize("name", SEVERAL)
def test_memory_and_time_of_several_processes_are_within_a_fifth_of_recorded_runs(name: str, corpus: Path) -> None:
    record = SEVERAL[name]
    model = {"model_type": "qwen3"} | record["shape"]["model"]
    layout = "context" if name.startswith("cp") else "shard"
    recipe = make_recipe(
        {
            "name": name, "output": "out/none", "model": {"config": model}, "ttt": record["shape"]["ttt"],
            "tokenizer": {"train": {"vocab_size": model.pop("vocab_size")}},
            "data": {"train": {"text": f"jsonl:{corpus / 'train.jsonl'}"}},
            "optimizer": {"lr": 1e-4}, "steps": 3, "sequence_length": record["tokens"], "batch_size": record["rows"],
            "precision": "bf16", "activation_checkpointing": True, "align_documents": True,
            "parallel": {layout: record["processes"]},
        }
    )  # fmt: skip
    planned = plan(recipe, logit_tokens=8192)  # as the benchmark does, whose rows are not packed either
    planned = replace(planned, is_packed=False)
    if record["processes"] > 1:  # alone, the benchmark shards over one, which is not what a recipe does
        assert planned.total == pytest.approx(record["peak_bytes"], rel=0.2)
    assert seconds(planned, record) == pytest.approx(1 / record["tokens_per_second"], rel=0.2)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_logits_are_those_of_a_piece_where_the_loss_needs_no_more(values: dict[str, Any], family: str) -> None:
    values["tokenizer"] = {"train": {"vocab_size": 2**20}}
    values["model"]["config"]["model_type"] = family
    lines = [plan(make_recipe(values | {"batch_size": rows})).memory for rows in (1, 8)]
    counts = [memory["logits and their gradient"] // 2**20 for memory in lines]
    # in float32: logits, probabilities and their gradient; a piece's probabilities become its gradient
    assert counts == ([12 * 128, 8 * tokens_at_once(2**20)] if family == "mistral" else [12 * 128, 12 * 8 * 128])
    assert [memory.get("the head's gradient, by piece", 0) > 0 for memory in lines] == [False, family == "mistral"]


def test_records_were_found() -> None:
    assert len(TRAINED) >= 8
    assert len(PLANNED) == 3
    assert {"fsdp-rows", "cp-long"} <= set(SEVERAL)


def test_processes_share_memory_and_time(values: dict[str, Any]) -> None:
    values |= {"ttt": {"layers": "0::1", "chunk_size": 16}, "batch_size": 4, "align_documents": True}
    one = plan(make_recipe(values))
    for layout in ("shard", "context"):
        two = plan(make_recipe(values | {"parallel": {layout: 2}}))
        assert two.memory["optimizer state"] == one.memory["optimizer state"] // 2
        assert two.memory["activations"] == one.memory["activations"] // 2
        assert two.tokens == one.tokens // 2


def test_a_family_with_other_names_is_planned(values: dict[str, Any]) -> None:
    values["model"] = {"config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}}
    assert plan(make_recipe(values)).total > 0


@pytest.mark.parametrize("option", [["--tflops", "0"], ["--bandwidth", "0"], ["--bandwidth", "-1"]])
def test_rates_that_cannot_be_are_refused(option: list[str]) -> None:
    result = CliRunner().invoke(app, ["train", "recipes/scratch-500m.yaml", "--plan", *option])
    assert result.exit_code == 2
    assert "--tflops and --bandwidth must be above 0" in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_are_planned(command: str) -> None:
    arguments = [part for part in shlex.split(command) if part != "--plan"]
    result = CliRunner().invoke(app, [*arguments, "--plan"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "GFLOP a token" in result.output


@pytest.mark.parametrize("started_before", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_documented_scripts_start_what_their_recipe_needs(
    script: str, started_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by bash with launchers that only print; theirs are the parsers that read it, and the recipe is planned."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if started_before:
        for name in ("scratch-500m", "scratch-1.5b"):
            (tmp_path / "out" / name).mkdir(parents=True)
            (tmp_path / "out" / name / "recipe.json").touch()
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-3]"}
    done = subprocess.run(["bash", "-ec", DRY + script], env=environment, capture_output=True, text=True, check=True)
    commands = [lines.split("\n") for lines in done.stdout.removesuffix("\n\n").split("\n\n")]
    assert len(commands) == script.count("inplace_ttt train")
    for launcher, *arguments in commands:
        if launcher == "torchrun":
            given = torchrun_parser().parse_args(arguments)
            processes = int(given.nnodes.split(":")[-1]) * int(given.nproc_per_node)
        else:
            given = launch_command_parser().parse_args(arguments[1:])
            processes = given.num_processes
        assert given.module
        assert given.training_script == "inplace_ttt"
        started = given.training_script_args
        if "slurm" in script.lower():
            assert ("--resume" in started) == started_before
        result = CliRunner().invoke(app, [*started, "--plan"])
        assert result.exit_code == 0, (result.output, result.exception)
        assert f"one of {processes}:" in result.output


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 4
    assert {command.split()[0] for script in SCRIPTS for command in script.splitlines()} >= {
        "torchrun",
        "accelerate",
        "srun",
    }
