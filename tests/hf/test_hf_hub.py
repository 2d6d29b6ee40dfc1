"""What goes to the hub and comes from it: the named revision, the whole model, a model card. No network is used."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from contract.families import C, adapted, logits, plain, randomise, tokens
from huggingface_hub import CommitInfo, HfApi, RepoUrl
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import inplace_ttt as ittt
from inplace_ttt.hf.auto import base_config
from inplace_ttt.hf.directory import SETTINGS, TENSORS

IDS = tokens(2, 2 * C + 3)
FETCHING = {"token": "secret", "cache_dir": "cache", "local_files_only": True, "force_download": True}


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """org/model with two revisions and a checkpoint inside, org/adapter; what was asked of the hub."""
    for revision, lr in (("main", 0.03), ("v2", 0.5)):
        model = adapted("llama", torch.float32, lr=lr)
        ittt.save_pretrained(model, tmp_path / "org/model" / revision)
        ittt.save_pretrained(model, tmp_path / "org/model" / revision / "checkpoint-10")
        ittt.save_pretrained(
            model, tmp_path / "org/adapter" / revision, adapter_only=True, base=f"org/base@{revision}9"
        )
    asked = []

    def snapshot(repo_id, *, revision=None, **keywords):
        asked.append({"repo_id": repo_id, "revision": revision, **keywords})
        return str(tmp_path / repo_id / (revision or "main"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def lr(model):
    return ittt.fast_settings(model)["lr"]


# -- from the hub -----------------------------------------------------------------------------------------------------


def test_keywords_reach_the_hub(repositories):
    assert lr(ittt.from_pretrained("org/model")) == 0.03
    assert lr(ittt.from_pretrained("org/model", revision="v2")) == 0.5
    repositories.clear()
    ittt.from_pretrained("org/model", revision="v2", subfolder="checkpoint-10", **FETCHING)
    assert repositories == [
        {"repo_id": "org/model", "revision": "v2", "allow_patterns": ["checkpoint-10/*"], **FETCHING}
    ]


def test_a_name_that_loads_the_same_again(repositories, tmp_path):
    """A hub id stands for its main revision; another one is named by the copy that was loaded."""
    assert ittt.from_pretrained("org/model").config._name_or_path == "org/model"
    for place, keywords in (
        (Path("v2"), {"revision": "v2"}),
        (Path("main/checkpoint-10"), {"subfolder": "checkpoint-10"}),
    ):
        name = ittt.from_pretrained("org/model", **keywords).config._name_or_path
        assert Path(name) == tmp_path / "org/model" / place


def test_what_is_not_there_is_refused(repositories, tmp_path):
    with pytest.raises(ittt.UserError, match="org/model has no directory checkpoint-11"):
        ittt.from_pretrained("org/model", subfolder="checkpoint-11")
    local = tmp_path / "org/model/main"
    with pytest.raises(ittt.UserError, match="is a local directory, which has no revision 'v2'"):
        ittt.from_pretrained(local, revision="v2")
    assert ittt.is_attached(ittt.from_pretrained(local, subfolder="checkpoint-10", revision="main", token="secret"))


def test_an_adapter_s_base_has_its_own_revision(repositories, tmp_path, monkeypatch):
    asked = {}

    def load(name, **keywords):
        asked.update(keywords, name=name)
        raise OSError("no network here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(AutoConfig, "from_pretrained", load)
    for keywords, revision in (({}, "main9"), ({"revision": "v2"}, "v29")):
        asked.clear()
        with pytest.raises(ittt.UserError, match=r"its base model 'org/base' .*pass model="):
            ittt.from_pretrained("org/adapter", **keywords, token="secret", local_files_only=True, dtype=torch.float32)
        assert (asked["name"], asked["revision"], asked["token"]) == ("org/base", revision, "secret")
        assert asked["local_files_only"] is True


def test_an_adapter_of_a_whole_model_on_the_hub(repositories, tmp_path):
    """Its base is a folder of that repository."""
    ittt.save_pretrained(ittt.from_pretrained("org/model"), tmp_path / "adapter", adapter_only=True)
    base = json.loads((tmp_path / "adapter" / SETTINGS).read_text())["base"]
    assert (base["name"], base["subfolder"]) == ("org/model", "base")


def test_the_shape_of_an_adapter_on_the_hub(repositories, tmp_path, monkeypatch):
    """Of the adapter its settings alone are fetched, of its base the configuration at the revision it names."""
    read, asked = AutoConfig.from_pretrained, []

    def config(name, **where):
        asked.append((name, where))
        return read(tmp_path / name / "main") if name == "org/adapter" else plain("llama").config

    monkeypatch.setattr(AutoConfig, "from_pretrained", config)
    found, settings = base_config("org/adapter")
    assert (found.model_type, settings.lr) == ("llama", 0.03)
    assert asked == [("org/adapter", {}), ("org/base", {"revision": "main9"})]
    assert repositories == [{"repo_id": "org/adapter", "revision": None, "allow_patterns": [SETTINGS]}]


def test_variants_do_not_mix(tmp_path):
    """``variant`` names all weights of a directory, in both layouts, whole or in pieces."""
    models = {None: adapted("llama", torch.float32), "other": plain("llama", torch.float32)}
    ittt.attach(models["other"], ittt.InPlaceTTTConfig(layers="0::2", chunk_size=C, lr=0.03))
    randomise(models["other"])
    with torch.no_grad():
        for name, parameter in models["other"].named_parameters():
            if "ttt_" in name:
                parameter.mul_(3)
    for variant, model in models.items():
        ittt.save_pretrained(model, tmp_path / "whole", variant=variant)
        ittt.save_pretrained(model, tmp_path / "adapter", adapter_only=True, variant=variant)
        model.save_pretrained(tmp_path / "trainer", variant=variant)
        model.save_pretrained(tmp_path / "pieces", variant=variant, max_shard_size="50KB")
    assert {TENSORS, "inplace_ttt.other.safetensors"} <= {p.name for p in (tmp_path / "whole").iterdir()}
    for variant, model in models.items():
        for place in ("whole", "trainer", "pieces", "adapter"):
            base = {"model": plain("llama", torch.float32)} if place == "adapter" else {"dtype": torch.float32}
            again = ittt.from_pretrained(tmp_path / place, variant=variant, **base).eval()
            assert_close(logits(again, IDS), logits(model, IDS), atol=1e-5, rtol=0)
    for place in ("whole", "trainer"):
        with pytest.raises(ittt.UserError):
            ittt.from_pretrained(tmp_path / place, variant="third")


# -- to the hub -------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """A directory that gets what is uploaded, and the keywords of the uploads."""
    target, said = tmp_path / "uploaded", []

    def create_repo(self, repo_id, **keywords):
        said.append({"repo_id": repo_id, **keywords})
        return RepoUrl(f"https://huggingface.co/org/{repo_id.split('/')[-1]}")

    def create_commit(self, repo_id, operations, **keywords):
        said.append({"repo_id": repo_id, **keywords})
        for operation in operations:
            file = target / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as stream:
                file.write_bytes(stream.read())
        return CommitInfo("https://huggingface.co/org/x/commit/1", "", "", "1")

    def upload_folder(self, *, repo_id, folder_path, **keywords):
        said.append({"repo_id": repo_id, **keywords})
        shutil.copytree(folder_path, target, dirs_exist_ok=True)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: huggingface_hub.ModelCard("card")
    )
    return target, said


@pytest.mark.parametrize("adapter_only", [False, True])
def test_save_pretrained_uploads_everything(uploads, tmp_path, adapter_only):
    target, said = uploads
    model = adapted("llama", torch.float32)
    ittt.save_pretrained(
        model,
        tmp_path / "out",
        adapter_only=adapter_only,
        push_to_hub=True,
        repo_id="org/mine",
        private=True,
        commit_message="Mine",
    )
    assert said[0]["repo_id"] == "org/mine"
    assert said[0]["private"] is True
    assert said[1]["commit_message"] == "Mine"
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == files
    again = ittt.from_pretrained(target, **({"model": plain("llama", torch.float32)} if adapter_only else {}))
    assert_close(logits(again.eval(), IDS), logits(model, IDS), atol=1e-5, rtol=0)
    assert 'from_pretrained("org/mine"' in (target / "README.md").read_text()


@pytest.mark.parametrize("how", ["model.push_to_hub", "model.save_pretrained", "Trainer.push_to_hub"])
def test_what_transformers_uploads_is_whole(uploads, tmp_path, how):
    target, said = uploads
    model = adapted("llama", torch.float32)
    if how == "model.push_to_hub":
        model.push_to_hub("org/mine")
    elif how == "model.save_pretrained":
        model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id="org/mine", commit_message="Mine")
        assert said[-1]["commit_message"] == "Mine"
    else:
        arguments = TrainingArguments(tmp_path / "out", hub_model_id="org/mine", report_to=[], use_cpu=True)
        Trainer(model, arguments).push_to_hub()
    assert said[0]["repo_id"] == "org/mine"
    for loader in (ittt, AutoModelForCausalLM):
        again = loader.from_pretrained(target, dtype=torch.float32).eval()
        assert ittt.is_attached(again)
        assert_close(logits(again, IDS), logits(model, IDS), atol=1e-5, rtol=0)


# -- the model card ---------------------------------------------------------------------------------------------------


def read_card(directory):
    text = (directory / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_says_base_settings_and_how_to_load(tmp_path):
    model = adapted("llama", torch.float32, lr=0.07)
    results = {"books": {"on": 4.2, "off": 4.37}}
    ittt.save_pretrained(model, tmp_path / "mine", adapter_only=True, base="org/base@abc", results=results)
    front, body = read_card(tmp_path / "mine")
    assert front["library_name"] == "inplace-ttt"
    assert (front["base_model"], front["pipeline_tag"]) == ("org/base", "text-generation")
    for words in (
        "adapter for `org/base`, revision `abc`",
        'model = inplace_ttt.from_pretrained("mine")',
        "| lr | 0.07 |",
        "| chunk_size | 4 |",
        "| books | 4.200 | 4.370 |",
    ):
        assert words in body
    huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md").validate  # noqa: B018 (parses the front matter)
    ittt.save_pretrained(model, tmp_path / "whole")
    front, body = read_card(tmp_path / "whole")
    assert "base_model" not in front
    assert "nats" not in body


def test_the_card_s_line_loads_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted("llama", torch.float32)
    ittt.save_pretrained(model, "mine")
    code = (tmp_path / "mine" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)
    assert_close(logits(names["model"].eval(), IDS), logits(model, IDS), atol=1e-5, rtol=0)


def test_a_card_that_somebody_wrote_stays(tmp_path):
    model = adapted("llama", torch.float32)
    ittt.save_pretrained(model, tmp_path)
    ittt.configure(model, lr=0.5)
    ittt.save_pretrained(model, tmp_path)
    assert "| lr | 0.5 |" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    ittt.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"
