"""inspect, against the library's own answer on a loaded model."""

import json

import pytest
from tiny_models import CHUNK, tiny

import inplace_ttt as ittt


def figures(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def layers(model) -> list[dict]:
    return [{**vars(info), "shape": list(info.shape)} for info in ittt.adapting_layers(model)]


def test_attached_model(cli, folder):
    found = figures(cli("inspect", folder.model, "--json"))
    model = ittt.from_pretrained(folder.model)
    assert found["attached"]
    assert found["layers"] == layers(model)
    assert found["settings"]["chunk_size"] == CHUNK
    added = sum(p.numel() for n, p in model.named_parameters() if ".ttt_" in n)
    assert found["extra_parameters"] == added == 2 * (32 * 32 + 32 * 5)
    assert found["base_parameters"] == sum(p.numel() for p in model.parameters()) - added
    assert found["state_bytes"] == 2 * 4 * 32 * 48
    assert found["pending_bytes"] == 2 * 4 * CHUNK * (32 + 48)


@pytest.mark.parametrize(("text", "chosen"), [("::2", "::2"), ("1:", "1:"), ("0,-1", (0, -1)), ("2", (2,))])
def test_plain_model_shows_what_attach_would_do(cli, folder, text, chosen):
    found = figures(cli("inspect", folder.plain, "--layers", text, "--chunk-size", 7, "--json"))
    assert not found["attached"]
    assert found["layers"] == layers(ittt.attach(tiny(), ittt.InPlaceTTTConfig(layers=chosen)))
    assert found["settings"]["chunk_size"] == 7


def test_needs_no_weights(cli, folder, tmp_path):
    for name in ("plain", "model"):
        source, copy = getattr(folder, name), tmp_path / name
        for file in source.rglob("*.json"):
            (copy / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(source)).write_bytes(file.read_bytes())
        assert not list(copy.rglob("*.safetensors"))
        ours, theirs = (figures(cli("inspect", path, "--json")) for path in (copy, source))
        assert {**ours, "model": ""} == {**theirs, "model": ""}


def test_other_formats(cli, folder, tmp_path):
    """An adapter, transformers' own layout of an attached model, and the authors' format."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tiny()
    model.config._name_or_path = str(folder.plain)
    config = ittt.InPlaceTTTConfig(layers="1:", chunk_size=4, target="hidden_states")
    ittt.save_pretrained(ittt.attach(model, config), tmp_path / "adapter", adapter_only=True)
    model.save_pretrained(tmp_path / "transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 99}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
    ittt.save_release(ittt.attach(llama, config), tmp_path / "release")
    for name in ("adapter", "transformers", "release"):
        found = figures(cli("inspect", tmp_path / name, "--json"))
        assert found["attached"], name
        assert found["settings"]["chunk_size"] == 4
        assert [layer["index"] for layer in found["layers"]] == [1, 2]


def test_table(cli, folder):
    printed = cli("inspect", folder.plain, "--layers", "1").stdout
    assert "is a plain model; with fast weights attached" in printed
    row = next(line for line in printed.splitlines() if "model.layers.1.mlp.down_proj" in line)
    assert row.replace("│", " ").split() == [
        "1",
        "model.layers.1.mlp.down_proj",
        "32",
        "x",
        "48",
        "1,184",
        "6.0",
        "KiB",
    ]
    assert "1 of 3" in printed
    assert "rule sum, computed by path loop" in printed
    assert "has fast weights" in cli("inspect", folder.model).stdout


def test_rule_and_path(cli, tmp_path):
    """The rule with the options that are not its defaults, the bytes of all its tensors, and which path scans."""
    config = ittt.InPlaceTTTConfig(layers="1:", rule="momentum", rule_options={"beta": 0.5}, decay=0.1)
    ittt.save_pretrained(ittt.attach(tiny(), config), tmp_path / "momentum")
    found = figures(cli("inspect", tmp_path / "momentum", "--json"))
    assert {(layer["rule"], layer["path"]) for layer in found["layers"]} == {("momentum", "generic")}
    assert found["state_bytes"] == 2 * 2 * 4 * 32 * 48
    assert found["settings"]["rule_options"] == {"beta": 0.5}
    printed = cli("inspect", tmp_path / "momentum").stdout
    assert "rule momentum (decay 0.1, beta 0.5), computed by path generic" in printed
    gated = ittt.attach(tiny(), ittt.InPlaceTTTConfig(layers="1:", objective_options={"gates": True}))
    assert {(layer.rule, layer.path) for layer in ittt.adapting_layers(gated)} == {("sum", "generic")}
