"""inspect of a session file, against the session itself."""

import json
from dataclasses import asdict

import pytest
from tiny_models import LAYERS, opened

import inplace_ttt as ittt


@pytest.fixture
def session(folder, words, tokenizer, tmp_path):
    """A session with four samples, saved."""
    import torch

    session = ittt.Session(ittt.from_pretrained(folder.model, dtype=torch.float32), tokenizer, probe_every=300)
    session.origin = str(folder.model)
    session.read(words)
    session.save(tmp_path / "s.session")
    return session


def test_json(cli, session, tmp_path, folder):
    result = cli("inspect", tmp_path / "s.session", "--json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    reopened = opened(tmp_path / "s.session", folder.model)
    assert found["model"] == str(folder.model)
    assert found["stats"] == reopened.stats().to_dict()
    assert found["stats"]["tokens"] == session.stats().tokens
    assert found["layers"] == [asdict(layer) for layer in session.diagnostics()]
    assert len(found["layers"]) == len(range(0, LAYERS, 2))
    assert found["timeline"] == session.timeline.to_list() != []


def test_table(cli, session, tmp_path):
    stats = session.stats()
    printed = cli("inspect", tmp_path / "s.session", "--device", "cpu").stdout
    assert printed.startswith(f"{tmp_path / 's.session'}: model {session.origin}\n{stats.tokens:,} tokens; ")
    assert f"{stats.updates:,} updates a layer" in printed
    rows = [row for row in printed.splitlines() if row.startswith("│")]
    assert [row.replace("│", " ").split()[:2] for row in rows] == [["0", f"{stats.updates}"], ["2", f"{stats.updates}"]]
    assert f"{len(session.timeline.samples)} samples, one every 300 tokens" in printed


def test_picture(cli, session, tmp_path):
    for name in ("new/a.png", "b.svg"):
        result = cli("inspect", tmp_path / "s.session", "--plot", tmp_path / name)
        assert result.stdout.endswith(f"Picture: {tmp_path / name}\n")
        assert (tmp_path / name).stat().st_size > 5000
    result = cli("inspect", tmp_path / "s.session", "--plot", tmp_path / "c.pdf", "--json")
    assert json.loads(result.stdout)["timeline"]
    assert result.stderr == f"Picture: {tmp_path / 'c.pdf'}\n"


def test_changes_nothing(cli, session, tmp_path):
    before = (tmp_path / "s.session").read_bytes()
    cli("inspect", tmp_path / "s.session")
    assert (tmp_path / "s.session").read_bytes() == before


def test_refuses(cli, session, folder, tmp_path):
    path = tmp_path / "s.session"

    def error(*arguments) -> str:
        result = cli("inspect", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "must end in .png, .pdf, .svg" in error(path, "--plot", tmp_path / "a.gif")
    (tmp_path / "a.png").mkdir()
    assert "is a directory: name a file" in error(path, "--plot", tmp_path / "a.png")
    for option, value in (("--layers", "0"), ("--chunk-size", "0"), ("--target", "x")):
        assert f"{option} is for plain models" in error(path, option, value)
    for option in ("--plot", "--model", "--device"):
        assert f"{option} is for session files" in error(folder.plain, option, "x.png")
    assert f"{tmp_path / 'sessoin.st'}: no such file" in error(tmp_path / "sessoin.st")
    session.reset()
    session.save(path)
    assert "has no samples to draw yet (one every 300 tokens read)" in error(path, "--plot", tmp_path / "b.png")
    assert cli("inspect", path).stdout.endswith("0 samples, one every 300 tokens\n")
