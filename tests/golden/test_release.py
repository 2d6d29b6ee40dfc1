"""Every stored output of the authors' release, through ``from_pretrained`` on a directory in their format."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

import inplace_ttt as ittt

GROUPS = ["llama_emb_noproj", "llama_hs_proj", "qwen3_emb_proj", "qwen3_hs_noproj"]
LOGITS, WEIGHTS, GRADIENTS = 2e-4, 5e-5, 1e-4


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Directories in the authors' format, made from the stored weights, by group."""
    from locations import SHARED

    if not (SHARED / "golden").is_dir():
        pytest.skip(f"no golden outputs at {SHARED / 'golden'}")
    made = {}
    for name in GROUPS:
        data = load_file(SHARED / "golden" / f"{name}.safetensors")
        info = json.loads((SHARED / "golden" / f"{name}.json").read_text())
        path = tmp_path_factory.mktemp(name)
        weights = {k.removeprefix("weights/"): v for k, v in data.items() if k.startswith("weights/")}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(info["config"]))
        made[name] = path, data, info
    return made


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group names layers that do not exist, on purpose
        return ittt.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("group", GROUPS)
def test_training_outputs_and_gradients(release, group):
    path, data, _ = release[group]
    model = load(path)
    checked = 0
    for case in ("short", "one", "multi", "ragged"):
        for batch in ("train_b1", "train_b3"):
            prefix = f"{case}/{batch}"
            ids = data[f"{prefix}/input_ids"]
            model.zero_grad()
            out = model(ids, labels=ids, use_cache=False)
            torch.testing.assert_close(out.logits, data[f"{prefix}/logits"], atol=LOGITS, rtol=0)
            torch.testing.assert_close(out.loss, data[f"{prefix}/loss"][0], atol=1e-5, rtol=0)
            out.loss.backward()
            parameters = dict(model.named_parameters())
            for key in (k for k in data if k.startswith(f"{prefix}/grad/")):
                want = data[key]
                got = parameters[key.removeprefix(f"{prefix}/grad/")].grad
                got = torch.zeros_like(want) if got is None else got
                torch.testing.assert_close(got, want, atol=GRADIENTS * max(float(want.abs().max()), 1e-6), rtol=0)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("group", GROUPS)
def test_prefill_decode_and_final_weights(release, group):
    path, data, info = release[group]
    model = load(path)
    lr = info["config"]["ttt_lr"]

    def check_state(cache, prefix, seen):
        for key in (k for k in data if k.startswith(f"{prefix}_w/")):
            layer = int(key.rsplit("/", 1)[1])
            slow = model.model.layers[layer].mlp.down_proj.weight
            fast = ittt.fast_weights(cache)[layer]
            assert fast.seen == (seen,)
            weight = slow if fast.S is None else slow + lr * fast.S[0]
            torch.testing.assert_close(weight, data[key], atol=WEIGHTS, rtol=0)

    for case in ("short", "one", "multi", "ragged"):
        prefill, cont = data[f"{case}/infer/prefill_ids"], data[f"{case}/infer/cont_ids"].view(1, -1)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            got = model(prefill, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(got, data[f"{case}/infer/prefill_logits"], atol=LOGITS, rtol=0)
            check_state(cache, f"{case}/infer/prefill", prefill.shape[1])
            steps = [model(cont[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(cont.shape[1])]
        torch.testing.assert_close(torch.stack(steps), data[f"{case}/infer/decode_logits"], atol=LOGITS, rtol=0)
        check_state(cache, f"{case}/infer/final", prefill.shape[1] + cont.shape[1])


@pytest.mark.parametrize("group", GROUPS)
def test_export_is_their_format_again(release, group, tmp_path):
    path, _, info = release[group]
    model = load(path)
    ittt.save_release(model, tmp_path)
    stored, written = load_file(path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(written)
    assert all(torch.equal(stored[k], written[k]) for k in stored)
    config, again = info["config"], json.loads((tmp_path / "config.json").read_text())
    for key in ("model_type", "ttt_mode", "ttt_chunk", "ttt_lr", "ttt_proj", "ttt_target"):
        assert again[key] == config[key], key
    assert again["ttt_layers"] == [i for i in config["ttt_layers"] if i < config["num_hidden_layers"]]
    assert "inplace_ttt" not in again
    assert AutoConfig.from_pretrained(tmp_path).ttt_mode is True


def test_layers_beyond_the_model_are_named(release):
    from inplace_ttt.hf.release import load_release

    _, _, info = release["llama_hs_proj"]
    config, dropped = load_release({**info["config"], "ttt_layers": [0, 36]})
    assert config.layers == (0,)
    assert dropped == [36]


def test_what_their_format_cannot_say_is_refused(release, tmp_path):
    model = load(release["llama_hs_proj"][0])
    ittt.detach(model)
    ittt.attach(model, ittt.InPlaceTTTConfig(layers=":", decay=0.1))
    with pytest.raises(ittt.UserError, match=r"cannot express decay=0\.1"):
        ittt.save_release(model, tmp_path)
