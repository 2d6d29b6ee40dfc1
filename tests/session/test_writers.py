"""Two writers of one session file: nothing that either of them learned is lost without a word."""

import time
from pathlib import Path

import pytest
from forked import Forked
from session.models import TEXT, tiny, tokenizer
from typer.testing import CliRunner

from inplace_ttt import Session, UserError
from inplace_ttt.cli import app
from inplace_ttt.cli.chat import Conversation
from inplace_ttt.session import writers


def hold(path: Path) -> None:
    with writers.holding(path):
        print("held", flush=True)
        time.sleep(600)


def session(text: str = TEXT) -> Session:
    s = Session(tiny("llama"), tokenizer(), decay=0)
    s.read(text)
    return s


def load(path: Path) -> Session:
    return Session.load(path, tiny("llama"), tokenizer())


@pytest.fixture
def saved(tmp_path):
    session().save(tmp_path / "a.session")
    return tmp_path / "a.session"


@pytest.fixture
def holder(saved):
    """Another process that holds the file."""
    child = Forked(lambda: hold(saved))
    assert child.stdout.readline() == b"held\n"
    yield child
    child.kill()
    child.wait()


def test_the_later_writer_is_told(saved):
    first, second = load(saved), load(saved)
    first.read("one")
    second.read("one two three four five six")
    second.save(saved)
    second.save(saved)  # what it wrote itself it may replace
    with pytest.raises(UserError, match=r"written by somebody else since .*save under another name"):
        first.save(saved)
    assert load(saved).stats().tokens == second.stats().tokens
    first.save(saved.with_name("b.session"))
    assert load(saved.with_name("b.session")).stats().tokens == first.stats().tokens
    assert sorted(p.name for p in saved.parent.iterdir()) == ["a.session", "b.session"]


def test_what_a_session_never_knew_it_replaces_as_any_program_does(saved, tmp_path, monkeypatch):
    session("other").save(saved)
    known = load(saved)
    saved.unlink()
    known.save(saved)  # nothing is lost
    monkeypatch.chdir(tmp_path)
    known.save("a.session")  # another name of the same file
    session("more").save(saved)
    with pytest.raises(UserError, match="written by somebody else"):
        known.save("a.session")


def test_a_file_that_appears_while_a_command_begins_a_new_session(tmp_path):
    s = session()
    writers.remember(s, tmp_path / "new.session")
    session("other").save(tmp_path / "new.session")
    with pytest.raises(UserError, match="written by somebody else"):
        s.save(tmp_path / "new.session")


def test_while_another_process_holds_the_file(saved, holder, monkeypatch):
    with pytest.raises(UserError, match="in use by another inplace-ttt read or chat"), writers.holding(saved):
        pass
    monkeypatch.setattr(writers, "PATIENCE", 0.1)
    s = load(saved)
    with pytest.raises(UserError, match="in use by another process"):
        s.save(saved)
    holder.kill()  # leaves its lock file behind, unlocked
    holder.wait()
    assert saved.with_name(".a.session.lock").exists()
    s.save(saved)
    with writers.holding(saved):
        s.save(saved)  # this process holds it itself
        assert saved.with_name(".a.session.lock").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["a.session"]


def test_commands_are_refused_before_they_read_anything(saved, holder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    before = saved.read_bytes()
    for command in (["read", str(tmp_path / "text.txt")], ["chat"]):
        result = CliRunner().invoke(app, [*command, "--session", str(saved)])
        assert result.exit_code == 2
        assert "a.session is in use by another inplace-ttt read or chat" in result.output
    assert saved.read_bytes() == before
    assert CliRunner().invoke(app, ["inspect", str(saved)]).exit_code == 2  # of another model: it got as far as that


def test_chat_holds_the_file_that_it_keeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(Conversation, "on_stats", lambda *_: seen.append({path.name for path in writers._held}))
    lines = ["/stats", "/save b.session", "/stats", "/save", "/stats", "/fork", "/stats", "/quit"]
    result = CliRunner().invoke(app, ["chat", "--session", "a.session"], input="\n".join(lines))
    assert result.exit_code == 0, result.output
    assert seen == [{"a.session"}, {"b.session"}, {"b.session"}, set()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.session"]


def test_a_session_of_a_model_with_a_disabled_adapter(tmp_path):
    """What is switched on is part of what the model is; a file says so."""
    peft = pytest.importorskip("peft")
    from contract.families import adapted

    model = peft.get_peft_model(
        adapted("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    on = Session(model)
    on.read(list(range(1, 20)))
    on.save(tmp_path / "on")
    with model.disable_adapter():
        off = Session(model)
        off.read(list(range(1, 20)))
        off.save(tmp_path / "off")
        Session.load(tmp_path / "off", model)
        with pytest.raises(
            UserError, match=r"was written with the adapters \['default'\] switched on, this model has \[\]"
        ):
            Session.load(tmp_path / "on", model)
    Session.load(tmp_path / "on", model)
    with pytest.raises(UserError, match=r"was written with the adapters \[\] switched on"):
        Session.load(tmp_path / "off", model)
