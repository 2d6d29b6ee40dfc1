"""A model that was never trained says so wherever it would pretend to learn; a plain one can learn by the loss."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CHUNK, tiny

import inplace_ttt as ittt
from inplace_ttt.hf.attach import PLAIN, UNTRAINED


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, tokenizer):
    """A saved model that was attached and never trained."""
    path = tmp_path_factory.mktemp("fresh") / "model"
    model = ittt.attach(tiny(sliding_window=None), ittt.InPlaceTTTConfig(layers="0::2", chunk_size=CHUNK))
    ittt.save_pretrained(model, path, tokenizer)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tokenizer):
    """A saved model without fast weights, and without a window."""
    path = tmp_path_factory.mktemp("plain") / "model"
    tiny(sliding_window=None).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def text(output: str) -> str:
    return " ".join(output.split())


def test_attach(caplog, folder):
    ittt.attach(tiny())
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [(logging.WARNING, UNTRAINED)]
    caplog.clear()
    ittt.attach(tiny(), ittt.InPlaceTTTConfig(objective="loss"))
    ittt.from_pretrained(folder.model)
    with torch.device("meta"):
        ittt.attach(tiny())
    assert not caplog.records


def test_the_sentence_names_both_ways_out():
    for sentence in (UNTRAINED, PLAIN):
        assert 'objective="loss"' in sentence
        assert "train RECIPE --plan" in sentence


def test_demo(cli, folder, fresh, tmp_path):
    result = cli("demo", folder.text, "--model", fresh, "--plot", tmp_path / "x.png")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"error: {UNTRAINED}\n")


def test_eval(cli, folder, fresh, tmp_path):
    arguments = ("--data", folder.text, "--length", 128, "--out", tmp_path / "out")
    result = cli("eval", fresh, *arguments)
    assert result.exit_code == 0, result.output
    assert UNTRAINED in text(result.stderr)
    assert result.stdout.splitlines()[0] == UNTRAINED
    assert "no clear difference" not in result.stdout
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["verdicts"] == [UNTRAINED]
    trained = cli("eval", folder.full, *arguments[:-1], tmp_path / "trained")
    assert UNTRAINED not in text(trained.output)


def test_read_and_inspect_of_a_session(cli, folder, fresh, tmp_path):
    read = cli("read", folder.text, "--session", tmp_path / "s.session", "--model", fresh)
    assert read.exit_code == 0, read.output
    assert f"warning: {UNTRAINED}" in read.stderr.splitlines()
    for printed in (read.stdout, cli("inspect", tmp_path / "s.session").stdout):
        assert f"warning: {UNTRAINED}" in printed.splitlines()


def test_inspect(cli, folder, fresh, tmp_path):
    model = ittt.from_pretrained(fresh)
    model.save_pretrained(tmp_path / "transformers")
    for path in (fresh, tmp_path / "transformers"):
        printed = cli("inspect", path).stdout
        assert "has fast weights, untrained:" in text(printed), path
        assert printed.splitlines()[-1] == UNTRAINED
    printed = cli("inspect", folder.plain).stdout
    assert "is a plain model; with fast weights attached" in printed
    assert printed.splitlines()[-1] == UNTRAINED
    for arguments in ((folder.model,), (folder.plain, "--objective", "loss"), ("--model", folder.full)):
        assert UNTRAINED not in cli("inspect", *arguments).stdout
    tensors = load_file(fresh / "inplace_ttt.safetensors")
    conv = next(name for name in tensors if "ttt_conv" in name)
    tensors[conv][0] = 1.0  # one layer that learns is enough
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "inplace_ttt.safetensors")
    for name in ("inplace_ttt.json", "config.json", "base/config.json"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes((fresh / name).read_bytes())
    assert UNTRAINED not in cli("inspect", tmp_path / "model").stdout


def test_chat(cli, fresh):
    result = cli("chat", "--model", fresh, "--max-tokens", 3, input="the file\n/stats\n/ask who?\n/drop\n")
    assert result.exit_code == 0, result.output
    said = result.stderr.splitlines()
    assert said[2] == UNTRAINED
    assert f"warning: {UNTRAINED}" in said
    assert said.count(UNTRAINED) == 2  # at the start, and before an answer from memory
    assert f"the context is forgotten, {UNTRAINED}" in said


def test_session_and_export(fresh, tokenizer, tmp_path):
    session = ittt.Session(ittt.from_pretrained(fresh, dtype=torch.float32), tokenizer)
    session.read("the file is read " * 20)
    assert session.warning == session.stats().warning == UNTRAINED
    with pytest.raises(ittt.UserError, match=re.escape(UNTRAINED)):
        session.export_lora(tmp_path / "lora")


@pytest.mark.parametrize(
    "command",
    [
        ("demo", "TEXT", "--model", "PLAIN"),
        ("eval", "PLAIN", "--data", "TEXT"),
        ("eval", "--model", "PLAIN", "--data", "TEXT"),
        ("read", "TEXT", "--session", "NEW", "--model", "PLAIN"),
        ("chat", "--model", "PLAIN"),
        ("serve", "PLAIN", "--port", "0"),
    ],
)
def test_commands_on_a_plain_model(cli, folder, tmp_path, command):
    places = {"PLAIN": folder.plain, "TEXT": folder.text, "NEW": tmp_path / "s.session"}
    result = cli(*(places.get(part, part) for part in command))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"error: {folder.plain} {PLAIN}"


def test_plain_models_learn_by_the_loss(cli, folder, plain, tmp_path):
    """Every command attaches the loss to a plain model; its figures are the library's."""
    by_loss = ("--model", plain, "--objective", "loss")
    arguments = ("--data", folder.text, "--length", 1024, "--sweep", "update_size=0.001,auto")
    evaluated = cli("eval", *by_loss, *arguments, "--out", tmp_path / "out")
    assert evaluated.exit_code == 0, evaluated.output
    tables = json.loads((tmp_path / "out" / "summary.json").read_text())["tables"]
    found = {row["variant"]: row["value"] for row in tables["nll by document"]}
    assert len({found[label] for label in ("on", "off", "update_size=0.001", "update_size=auto")}) >= 3
    assert found["on"] != found["off"]
    figures = json.loads(cli("inspect", *by_loss, "--json").stdout)
    assert figures["settings"]["objective"] == "loss"
    assert figures["extra_parameters"] == 0
    assert not figures["untrained"]
    read = cli("read", folder.text, "--session", tmp_path / "s.session", *by_loss)
    assert "updates a layer" in read.stdout, read.output
    again = cli("read", folder.text, "--session", tmp_path / "s.session", "--objective", "loss")
    assert again.exit_code == 0, again.output
    other = cli("read", folder.text, "--session", tmp_path / "s.session", "--objective", "learned")
    assert "--objective is for a new session" in other.stderr
    demo = cli("demo", folder.text, *by_loss, "--max-tokens", 512, "--plot", tmp_path / "demo.png")
    assert demo.exit_code == 0, demo.output


def test_an_objective_is_for_plain_models(cli, folder, tmp_path):
    for command in (("eval", folder.model, "--data", folder.text), ("demo", folder.text, "--model", folder.model)):
        result = cli(*command, "--objective", "loss")
        assert result.exit_code == 2
        assert f"{folder.model} has fast weights already: leave the objective out" in text(result.stderr)
    assert "objective can only be set for a plain model" in text(
        cli("inspect", folder.model, "--objective", "loss").stderr
    )
    twice = cli("eval", folder.model, "--model", folder.model, "--data", folder.text)
    assert "name it once" in text(twice.stderr)


def test_large_chunks_say_that_nothing_was_learned_yet(cli, tokenizer, tmp_path):
    """A short chat with a model that updates after 1,024 tokens: not silently from an empty memory."""
    model = ittt.attach(tiny(sliding_window=None), ittt.InPlaceTTTConfig(layers="0::2", chunk_size=1024))
    for layer in model.model.layers[::2]:
        torch.nn.init.normal_(layer.mlp.ttt_conv.weight)
    ittt.save_pretrained(model, tmp_path / "model", tokenizer)
    result = cli("chat", "--model", tmp_path / "model", "--max-tokens", 3, input="the\n/stats\n/ask who?\n/drop\n")
    said = result.stderr.splitlines()
    why = "nothing was learned yet: 0 updates so far, one comes after every 1,024 tokens"
    assert said[2] == "It learns after every 1,024 tokens; 0 updates so far."
    assert said.count(why) == 2  # in /stats and before the answer to /ask
    assert f"the context is forgotten, {why}" in said


def test_chat_learns_each_turn_by_the_loss(cli, plain, tmp_path):
    arguments = ("--model", plain, "--objective", "loss", "--max-tokens", 3, "--session", tmp_path / "s")
    result = cli("chat", *arguments, input="the file was read\n/stats\nand then\n/stats\n/drop\n")
    said = result.stderr.splitlines()
    assert said[2] == "It learns after every 128 tokens and at the end of each turn; 0 updates so far."
    assert [int(n) for n in re.findall(r"(\d+) updates a layer", result.stderr)] == [1, 2]
    assert "the context is forgotten, what was learned is kept" in said


def test_serve(cli, fresh, monkeypatch):
    monkeypatch.setattr("inplace_ttt.serve.run.Server._loaded", lambda server, _: setattr(server, "should_exit", True))
    assert f"warning: {UNTRAINED}" in cli("serve", fresh, "--port", 0).stdout.splitlines()
