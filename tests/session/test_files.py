"""Session files: whole or not at all, and refused with a reason when they do not fit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from contract.families import adapted
from forked import Forked
from safetensors.torch import safe_open, save_file
from session.models import TEXT, tiny, tokenizer

import inplace_ttt as ittt
from inplace_ttt import Session, UserError
from inplace_ttt.session import files


def session(**options) -> Session:
    return Session(tiny("llama"), tokenizer(), **({"decay": 0} | options))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    s = session()
    s.read(TEXT)
    s.save(tmp_path / "a.session")
    return tmp_path / "a.session"


def rewrite(path: Path, change=lambda header: None, metadata=lambda m: None, tensors=lambda t: None) -> Path:
    """The same file with something changed and its checksum right again."""
    with safe_open(path, "pt") as file:
        meta, found = dict(file.metadata()), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header = json.loads(meta["header"])
    change(header)
    tensors(found)
    meta["header"] = json.dumps(header)
    meta["digest"] = files._digest(meta["header"], found)
    metadata(meta)
    save_file(found, path, metadata=meta)
    return path


@pytest.mark.parametrize("state", ["dense", "auto", 6], ids=str)
@pytest.mark.parametrize("window", [None, 28])
def test_round_trip(tmp_path, state, window):
    s = session(state=state, window=window, sinks=2, probe_every=64)
    s.origin = "somewhere"
    s.read(TEXT * 2)
    s.generate("It was", max_new_tokens=5)
    s.save(tmp_path / "a.session")
    again = Session.load(tmp_path / "a.session", tiny("llama"), tokenizer())
    assert again.origin == "somewhere"
    assert (again._encoder.state(), again.timeline.to_list()) == (s._encoder.state(), s.timeline.to_list())
    for x in (s, again):
        x.read(TEXT)
    assert torch.equal(again.next_logits, s.next_logits)
    assert again.stats().to_dict() | {"bytes_context": 0} == s.stats().to_dict() | {"bytes_context": 0}


def test_a_new_session_can_be_saved(tmp_path):
    session().save(tmp_path / "empty.session")
    again = Session.load(tmp_path / "empty.session", tiny("llama"), tokenizer())
    assert again.stats().tokens == 0
    again.read(TEXT)


def test_bfloat16(tmp_path):
    model = adapted("llama", torch.bfloat16)
    s = Session(model)
    s.read(list(range(1, 60)))
    s.save(tmp_path / "a.session")
    again = Session.load(tmp_path / "a.session", model)
    assert torch.equal(again.next_logits, s.next_logits)
    assert again.fast_weights[0].S.dtype == torch.float32


def test_nothing_in_the_file_is_code(saved):
    data = saved.read_bytes()
    assert data[8:9] == b"{"  # safetensors: length, JSON, numbers
    size = int.from_bytes(data[:8], "little")
    assert isinstance(json.loads(data[8 : 8 + size]), dict)


class TestRefused:
    """Each with a reason, and nothing changes."""

    def refuse(self, path: Path, reason: str, model=None) -> None:
        with pytest.raises(UserError, match=reason):
            Session.load(path, tiny("llama") if model is None else model, tokenizer())

    def test_truncated_anywhere(self, saved):
        data = saved.read_bytes()
        for share in (0, 1e-5, 0.01, 0.3, 0.7, 0.999999):
            saved.write_bytes(data[: int(len(data) * share)])
            self.refuse(saved, "not a complete session file")

    def test_a_flipped_bit_anywhere(self, saved):
        data = bytearray(saved.read_bytes())
        generator = random.Random(0)
        for _ in range(40):
            at, bit = generator.randrange(len(data)), 1 << generator.randrange(8)
            data[at] ^= bit
            saved.write_bytes(bytes(data))
            with pytest.raises(UserError):
                Session.load(saved, tiny("llama"), tokenizer())
            data[at] ^= bit

    def test_foreign(self, saved, tmp_path):
        other = tmp_path / "other.safetensors"
        save_file({"x": torch.zeros(3)}, other)
        self.refuse(other, "not a session file")
        other.write_text("Call me Ishmael.")
        self.refuse(other, "not a complete session file")
        torch.save({"x": 1}, other)
        self.refuse(other, "not a complete session file")
        self.refuse(tmp_path, "directory")
        self.refuse(tmp_path / "missing", "no such file")

    def test_newer(self, saved):
        self.refuse(rewrite(saved, metadata=lambda m: m.update(version="3")), "update inplace-ttt")
        self.refuse(rewrite(saved, metadata=lambda m: m.update(version="new")), "damaged")

    def test_another_model_of_the_same_shape(self, saved):
        model = adapted("llama", torch.float64, {"vocab_size": len(tokenizer())})
        with torch.no_grad():
            model.model.layers[1].self_attn.q_proj.weight += 0.01
        self.refuse(saved, "other weights", model)

    def test_another_kind_of_model(self, saved):
        self.refuse(saved, "llama model, this one is glm", tiny("glm"))

    def test_another_precision(self, saved):
        model = adapted("llama", torch.float32, {"vocab_size": len(tokenizer())})
        self.refuse(saved, "float64, this one is in float32", model)

    def test_other_fast_weights(self, saved):
        self.refuse(saved, "fast weights", tiny("llama", layers=(0,)))

    def test_another_tokenizer(self, saved):
        with pytest.raises(UserError, match="pass tokenizer"):
            Session.load(saved, tiny("llama"))
        self.refuse(rewrite(saved, lambda h: h.update(tokenizer="0" * 64)), "another tokenizer")

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda h: h.pop("fast"),
            lambda h: h.update(stream={}),
            lambda h: h["settings"].update(chunk_size=-1),
            lambda h: h["fast"].pop("0"),
            lambda h: h["fast"]["0"].update(seen=[3, 4]),
            lambda h: h["fast"]["0"].update(seen=[3]),
            lambda h: h["fast"]["0"].update(chunk_size=8),
            lambda h: h["fast"]["0"].update(extra=1),
            lambda h: h.update(model=None),
            lambda h: h["stream"].update(position="x"),
            lambda h: h["stream"].update(unknown=1),
        ],
    )
    def test_a_header_that_makes_no_sense(self, saved, break_it):
        self.refuse(rewrite(saved, break_it), "damaged|chunk")

    @pytest.mark.parametrize("state", ["dense", "auto", 6], ids=str)
    def test_any_header_is_refused_or_as_good_as_another(self, tmp_path, state):
        """Random changes under a right checksum: a plain error, or a session that works."""
        model, generator = adapted("llama"), random.Random(0)
        s = Session(model, state=state, window=28, sinks=2, probe_every=16)
        s.read([1 + (7 * i) % 90 for i in range(300)])
        s.save(tmp_path / "a.session")
        data, refused = (tmp_path / "a.session").read_bytes(), 0
        values = [None, True, -1, 5, 2**70, 0.5, float("nan"), "x", [], {}, [-1], ["x"], [[]], [2**70]]

        def places(x, before=()):
            for key in x if isinstance(x, dict) else range(min(len(x), 3)) if isinstance(x, list) else ():
                yield (*before, key)
                yield from places(x[key], (*before, key))

        def change(header):
            *path, last = generator.choice(list(places(header)))
            inner = header
            for key in path:
                inner = inner[key]
            old = inner[last]
            number = type(old) is int and generator.random() < 0.5
            inner[last] = old + generator.choice([-4, -1, 1, 4]) if number else generator.choice(values)

        for _ in range(40):
            (tmp_path / "b.session").write_bytes(data)
            try:
                again = Session.load(rewrite(tmp_path / "b.session", change), model)
            except UserError:
                refused += 1
                continue
            assert again.stats().to_dict()
            assert again.diagnostics()
            again.read([5, 6, 7] * 9)
            again.fork().generate_ids(max_new_tokens=2, repetition_penalty=1.1)
            again.save(tmp_path / "c.session")
            Session.load(tmp_path / "c.session", model)
        assert refused > 20

    @pytest.mark.parametrize(
        "break_it",
        [
            lambda t: t.update({"fast.0.tensors.S": t["fast.0.tensors.S"][:, :5].clone()}),
            lambda t: t.update({"fast.0.tensors.S": t["fast.0.tensors.S"].float()}),
            lambda t: t.pop("fast.0.z"),
            lambda t: t.pop("logits"),
            lambda t: t.update({"logits": t["logits"][:7].clone()}),
            lambda t: t.pop(next(k for k in t if k.startswith("context."))),
            lambda t: t.update({"fast.0.other": torch.zeros(2)}),
            lambda t: t.update({"fast.9.S": torch.zeros(2)}),
            lambda t: t.update({"fast.0.real": torch.ones(1, 3, dtype=torch.bool)}),
            lambda t: t.update({"context.0.keys": torch.cat([t["context.0.keys"]] * 2, -1)}),
        ],
    )
    def test_tensors_that_make_no_sense(self, saved, break_it):
        self.refuse(rewrite(saved, tensors=break_it), "damaged")


class TestAtomic:
    def test_a_failed_save_leaves_the_old_file(self, saved, monkeypatch):
        before = saved.read_bytes()

        def fail(*_, **__):
            raise OSError("disk full")

        monkeypatch.setattr(files, "save_file", fail)
        s = session()
        s.read(TEXT[:50])
        with pytest.raises(OSError, match="disk full"):
            s.save(saved)
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [saved.name]

    def test_what_the_writer_leaves_beside_its_file_goes_too(self, saved, monkeypatch):
        """safetensors writes into a file of its own first, which stays where it is broken off."""

        def torn(tensors, name, metadata):
            (Path(name).parent / ".tmpX").touch()
            raise OSError("disk full")

        monkeypatch.setattr(files, "save_file", torn)
        with pytest.raises(OSError, match="disk full"):
            session().save(saved)
        assert os.listdir(saved.parent) == [saved.name]

    def test_kill_at_any_moment_leaves_a_whole_file(self, tmp_path):
        path = tmp_path / "a.session"

        def save_again_and_again():
            torch.set_num_threads(1)
            s = Session(tiny("llama"), tokenizer(), decay=0)
            while True:
                s.read(TEXT[:100])
                s.save(path)
                print(s.stats().tokens, flush=True)

        generator = random.Random(0)
        child = Forked(save_again_and_again)
        child.stdout.readline()
        for _ in range(4):
            time.sleep(generator.random() * 0.1)
            os.kill(child.pid, signal.SIGSTOP)  # frozen in the middle of something: what a kill would leave
            assert Session.load(path, tiny("llama"), tokenizer()).stats().tokens > 0
            os.kill(child.pid, signal.SIGCONT)
        time.sleep(generator.random() * 0.05)
        child.kill()
        child.wait()
        s = Session.load(path, tiny("llama"), tokenizer())
        (tmp_path / ".a.session.part").mkdir(exist_ok=True)
        (tmp_path / ".a.session.part" / ".tmpX").touch()
        s.save(path)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]  # remains of the killed one are gone

    def test_permissions_follow_the_umask(self, saved):
        (saved.parent / "other").touch()
        assert saved.stat().st_mode == (saved.parent / "other").stat().st_mode

    def test_what_is_no_file_is_not_replaced(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UserError, match="not a regular file"):
            session().save(tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()

    def test_a_link_is_followed(self, tmp_path):
        (tmp_path / "disk").mkdir()
        link, target = tmp_path / "link", tmp_path / "disk" / "a.session"
        link.symlink_to(Path("disk", "a.session"))
        for n in (3, 5):  # the target is missing, then there
            s = Session(tiny("llama"))
            s.read(range(1, n + 1))
            s.save(link)
            assert link.is_symlink()
            assert Session.load(target, tiny("llama")).stats().tokens == n
        assert [p.name for p in target.parent.iterdir()] == [target.name]

    def test_a_directory_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="directory"):
            session().save(tmp_path)


def test_default_model_can_be_named(tmp_path):
    assert files.identity(ittt.from_pretrained(ittt.DEFAULT_MODEL))["dtype"] == "bfloat16"
