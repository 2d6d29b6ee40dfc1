"""Settings: what is refused and why, JSON there and back, files of other versions."""

import json

import pytest
from contract.families import plain

import inplace_ttt as ittt
from inplace_ttt.config import FORMAT_VERSION

Config = ittt.InPlaceTTTConfig


@pytest.mark.parametrize(
    ("settings", "say"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"conv_kernel": 0, "lookahead": 0}, "conv_kernel must be at least 1"),
        ({"conv_kernel": 3, "lookahead": 3}, "lookahead must be from 0 to conv_kernel - 1 = 2, got 3"),
        ({"lookahead": -1}, "lookahead must be from 0"),
        ({"target": "embeddings"}, "target must be one of input_embed, hidden_states, got 'embeddings'"),
        (
            {"objective": "next"},
            "objective must be one of learned, loss, next_error, next_token, reconstruction, got 'next'",
        ),
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, "decay must be in"),
        ({"clip": 0.0}, "clip must be positive or None"),
        ({"clip": -1.0}, "clip must be positive or None"),
        ({"layers_path": "model.layers"}, "give both or neither"),
        ({"projection_path": "mlp.fc2"}, "give both or neither"),
        ({"chunk_size": 512.5}, "chunk_size must be a whole number, got 512.5"),
        ({"chunk_size": "512"}, "chunk_size must be a whole number, got '512'"),
        ({"chunk_size": True}, "chunk_size must be a whole number, got True"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"lr": float("nan")}, "lr must be finite, got nan"),
        ({"decay": "0"}, "decay must be a number"),
        ({"init_std": -1.0}, "init_std must not be negative"),
        ({"layers": 3}, "layers must be a slice such as .* or a list of numbers, got 3"),
        ({"layers": ("a",)}, "layers must be a slice such as .* or a list of numbers"),
        ({"layers": (1.5,)}, "layers must be a slice such as .* or a list of numbers"),
        ({"projection": "no"}, "projection must be true or false, got 'no'"),
    ],
)
def test_what_is_refused(settings, say):
    with pytest.raises(ittt.UserError, match=say):
        Config(**settings)


def test_an_unknown_setting_is_a_plain_type_error():
    with pytest.raises(TypeError, match="chunksize"):
        Config(chunksize=3)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(layers=(0, -1), chunk_size=7, conv_kernel=3, lookahead=0, target="hidden_states", lr=0.5, decay=0.1),
        Config(layers="1:", objective="next_token", projection=False, clip=0.1, clip_relative=True, init_std=0.0),
        Config(layers_path="model.layers", projection_path="mlp.fc2", lr=2),
    ],
)
def test_json_there_and_back(config):
    text = json.dumps(config.to_dict())
    assert Config.from_json(text) == config
    assert json.loads(text)["format_version"] == FORMAT_VERSION


def test_a_list_is_as_good_as_a_tuple():
    assert Config(layers=[0, 2]) == Config(layers=(0, 2))
    assert hash(Config(layers=[0, 2])) == hash(Config(layers=(0, 2)))


def test_an_unknown_key_warns_and_is_ignored():
    values = Config(chunk_size=9).to_dict() | {"momentum": 0.9, "alpha": 1}
    with pytest.warns(UserWarning, match="ignored unknown settings of In-Place TTT: alpha, momentum"):
        assert Config.from_dict(values) == Config(chunk_size=9)


def test_missing_keys_take_the_defaults():
    assert Config.from_dict({"chunk_size": 9}) == Config(chunk_size=9)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, "new", None])
def test_other_formats_are_refused(version):
    with pytest.raises(ittt.UserError, match=f"format {version!r}, .*reads up to {FORMAT_VERSION}: update inplace-ttt"):
        Config.from_dict({"format_version": version})


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"x"', ""])
def test_damaged_json(text):
    with pytest.raises(ittt.UserError, match="not the settings of In-Place TTT"):
        Config.from_json(text)


def test_the_model_remembers_its_settings():
    model = plain("llama")
    config = Config(layers=(0, -1), chunk_size=7)
    ittt.attach(model, config)
    assert Config.from_dict(model.config.inplace_ttt) == config
    assert json.loads(model.config.to_json_string())["inplace_ttt"]["chunk_size"] == 7
