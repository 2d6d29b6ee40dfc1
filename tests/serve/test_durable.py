"""Versions, saved states, files; a server that is stopped, killed, or not alone."""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import fsspec
import httpx2 as httpx
import pytest
import torch
from peft import PeftModel
from serve.running import Running, model, session
from session.models import TEXT, shipped, tokenizer
from typer.testing import CliRunner

import inplace_ttt as ittt
from inplace_ttt.cli import app
from inplace_ttt.serve.files import ExistsError, LocalFiles, open_files
from inplace_ttt.serve.store import KEPT_STATES, ConflictError, Store


def write(server, name: str, prompt: str = "It was", most: int = 5) -> str:
    client = server.openai(session=name)
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=most, temperature=0).choices[0].text


def test_versions_compare_and_set(server):
    http = server.http()
    http.post("/v1/sessions", json={"id": "v"})
    assert http.post("/v1/sessions/v/read", json={"text": TEXT[:50], "if_version": 0}).json()["version"] == 1
    refused = http.post("/v1/sessions/v/read", json={"text": "x", "if_version": 0})
    assert refused.status_code == 409
    assert "at version 1, not 0" in refused.json()["error"]["message"]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
    for version, status in ((7, 409), (1, 200)):
        headers = {"x-session-id": "v", "x-session-version": str(version)}
        assert http.post("/v1/completions", json=body, headers=headers).status_code == status
    assert http.get("/v1/sessions/v").json()["version"] == 3  # the prompt and what was written
    assert http.post("/v1/sessions", json={"id": "v"}).status_code == 409


def test_save_and_go_back(start):
    server = start()
    http = server.http()
    http.post("/v1/sessions", json={"id": "s"})
    refused = http.post("/v1/sessions/s/rollback")
    assert refused.status_code == 409
    assert "save it first" in refused.json()["error"]["message"]
    http.post("/v1/sessions/s/read", json={"text": TEXT[:90]})
    one = http.post("/v1/sessions/s/save").json()["version"]
    want = session()
    want.read(TEXT[:90])
    first = want.fork().generate("It was", max_new_tokens=5)
    assert write(server, "s") == first
    two = http.post("/v1/sessions/s/save").json()["version"]
    http.post("/v1/sessions/s/reset")
    assert http.get("/v1/sessions/s").json()["stats"]["tokens"] == 0
    assert http.get("/v1/sessions/s").json()["saved"] == [one, two]
    assert http.post("/v1/sessions/s/rollback", json={"version": 99}).status_code == 409
    version = http.post("/v1/sessions/s/rollback", json={"version": one}).json()["version"]
    assert version > two
    assert write(server, "s") == first
    http.post("/v1/sessions/s/rollback", json={"version": one})
    server.stop()
    server = start()
    assert server.http().get("/v1/sessions/s").json()["version"] > version
    assert write(server, "s") == first
    for _ in range(KEPT_STATES + 2):  # only so many are kept
        write(server, "s", most=1)
        server.http().post("/v1/sessions/s/save")
    saved = server.http().get("/v1/sessions/s").json()["saved"]
    assert len(saved) == KEPT_STATES
    assert one not in saved


def test_two_servers_on_one_directory(start):
    """A server sees what another did to a session, and never overwrites it."""
    a, b = start(), start()
    a.http().post("/v1/sessions", json={"id": "s"})
    want = session()
    for server, text in ((a, TEXT[:50]), (b, TEXT[50:90]), (a, TEXT[90:130])):
        assert server.http().post("/v1/sessions/s/read", json={"text": text}).status_code == 200
        want.read(text)
    assert write(b, "s") == want.generate("It was", max_new_tokens=5)
    store, key = a.engine.store, a.engine.store.key("local", "s")
    append = store.append

    def late(key, version, entry):
        append(key, version, {"op": "read", "text": "!"})  # somebody else was faster
        append(key, version, entry)

    store.append = late
    assert a.http().post("/v1/sessions/s/read", json={"text": "lost"}).status_code == 409
    store.append = append
    want.read("!")
    assert write(a, "s") == want.generate("It was", max_new_tokens=5)
    assert store.version(key) == a.http().get("/v1/sessions/s").json()["version"]


def test_what_the_journal_does_not_hold_is_not_kept(start, monkeypatch):
    """The disk is full while a session writes: it goes back to what is on disk."""
    server = start()
    http = server.http()
    http.post("/v1/sessions", json={"id": "s"})
    http.post("/v1/sessions/s/read", json={"text": TEXT[:60]})
    append, entries = server.engine.store.append, []

    def full(key, version, entry):
        entries.append(entry)
        if entry["op"] == "wrote":
            raise OSError(28, "No space left on device")
        append(key, version, entry)

    monkeypatch.setattr(server.engine.store, "append", full)
    body = {"model": "tiny", "prompt": "It was", "max_tokens": 3}
    failed = http.post("/v1/completions", json=body, headers={"x-session-id": "s"})
    assert failed.status_code == 500
    assert "No space" not in failed.text
    monkeypatch.undo()
    want = session()
    want.read(TEXT[:60])
    want.read("It was")
    assert write(server, "s", " and") == want.generate(" and", max_new_tokens=5)


def test_a_read_that_cannot_go_on_counts_up_to_there(start, monkeypatch):
    server = start()
    http = server.http()
    http.post("/v1/sessions", json={"id": "s"})
    real = ittt.Session.read

    def breaks(self, source, **options):
        if "whale" in str(source):
            real(self, str(source)[:10], **options)
            raise ittt.UserError("the context is full")
        return real(self, source, **options)

    monkeypatch.setattr(ittt.Session, "read", breaks)
    assert http.post("/v1/sessions/s/read", json={"text": TEXT[:50]}).status_code == 200
    failed = http.post("/v1/sessions/s/read", json={"text": "0123456789 the whale"})
    assert failed.status_code == 400
    assert "context is full" in failed.text
    server.stop()
    monkeypatch.undo()
    want = session()
    want.read(TEXT[:50])
    want.read("0123456789")
    assert write(start(), "s") == want.generate("It was", max_new_tokens=5)


def test_files_go_out_and_come_in(server, tmp_path):
    http = server.http()
    s = session()
    s.read(TEXT)
    s.save(tmp_path / "own.session")
    made = http.post("/v1/sessions", data={"id": "in"}, files={"file": (tmp_path / "own.session").read_bytes()})
    assert made.status_code == 201, made.text
    (tmp_path / "out").write_bytes(http.get("/v1/sessions/in/file").content)
    back = ittt.Session.load(tmp_path / "out", model(), tokenizer())
    want = s.fork().generate("It was", max_new_tokens=5)
    assert want == write(server, "in") == back.generate("It was", max_new_tokens=5)
    whole = bytearray((tmp_path / "own.session").read_bytes())
    whole[len(whole) // 2] ^= 255
    for wrong in (bytes(whole), whole[:100], b"", b"not a session at all"):
        refused = http.post("/v1/sessions", files={"file": bytes(wrong)})
        assert refused.status_code == 400
        assert "session file" in refused.json()["error"]["message"]
        assert "/tmp" not in refused.text
    other = session(chunk_size=4)
    other.read(TEXT)
    other.save(tmp_path / "other")
    refused = http.post("/v1/sessions", files={"file": (tmp_path / "other").read_bytes()})
    assert refused.status_code == 400
    assert "other settings" in refused.text


def test_export_as_lora(start, tmp_path):
    server = start()
    http = server.http()
    http.post("/v1/sessions", json={"id": "book"})
    refused = http.post("/v1/sessions/book/export")
    assert refused.status_code == 400
    assert "nothing was learned" in refused.text
    http.post("/v1/sessions/book/read", json={"text": TEXT})
    zipped = http.post("/v1/sessions/book/export", json={"rank": 4})
    assert zipped.headers["x-adapter-name"] == "book-v1"
    zipfile.ZipFile(io.BytesIO(zipped.content)).extractall(tmp_path)
    config = json.loads((tmp_path / "book-v1" / "adapter_config.json").read_text())
    assert config["r"] == 4
    server.service.adapters = tmp_path / "adapters"
    found = http.post("/v1/sessions/book/export", json={"rank": 4}).json()
    assert found["name"] == "book-v1"
    assert Path(found["path"]).parent == tmp_path / "adapters"
    with torch.no_grad():
        base = ittt.detach(copy.deepcopy(model()))
    PeftModel.from_pretrained(base, found["path"])


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket on a server that speaks S3's protocol."""
    pytest.importorskip("s3fs", reason="S3: pip install s3fs 'moto[s3,server]'")
    moto = pytest.importorskip("moto.server", reason="S3: pip install s3fs 'moto[s3,server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["directory", "memory", "precondition", "s3"])
def files(request, tmp_path, monkeypatch):
    """A directory, an object store, one that says "precondition failed" as S3 does, and S3's protocol itself."""
    if request.param == "directory":
        return open_files(tmp_path)
    if request.param == "s3":
        return open_files(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    found = open_files(f"memory://{tmp_path.name}")
    if request.param == "precondition":
        own = found.system.pipe_file

        def pipe(path, value, mode="overwrite"):
            try:
                own(path, value, mode)
            except FileExistsError:
                raise OSError(22, "Precondition failed") from None

        monkeypatch.setattr(found.system, "pipe_file", pipe)
    return found


def test_journal_and_states(files, tmp_path):
    store = Store(files)
    key = store.create("ada", "../../etc/passwd", {})
    assert re.fullmatch(r"[0-9a-f]{40}/[0-9a-f]{40}", key)
    with pytest.raises(ConflictError):
        store.create("ada", "../../etc/passwd", {})
    for version in range(1, 81):
        store.append(key, version, {"n": version})
    with pytest.raises(ConflictError):
        store.append(key, 80, {})
    with pytest.raises(ConflictError):
        store.append(key, 82, {})
    record = store.record(key)
    assert (record.version, record.state, [e["n"] for e in record.entries]) == (80, None, list(range(1, 81)))
    if isinstance(files, LocalFiles):
        (tmp_path / key / ".killed.part").write_bytes(b"half")
    files.put(f"{key}/state-000000000081-abc.session", lambda path: path.write_bytes(b"killed before it was named"))
    assert store.record(key).version == 80
    store.add_state(key, 80, lambda path: path.write_bytes(b"state 80"), {"history": []})
    store.append(key, 81, {"n": 81})
    record = store.record(key)
    assert (record.version, record.state.version, record.entries) == (81, 80, [{"n": 81}])
    with store.opened(record.state) as path:
        assert path.read_bytes() == b"state 80"
    assert sum(name.startswith("entry") for name in store.files.names(key)) == 66  # 0, and 17 to 81
    with pytest.raises(ExistsError):
        store.files.create(f"{key}/entry-000000000081.json", b"")
    assert [about["id"] for _, about in store.of_owner("ada")] == ["../../etc/passwd"]
    assert store.of_owner("eve") == []
    store.delete(key)
    assert store.record(key) is None
    assert store.version(key) is None


def test_where_sessions_can_be_kept(tmp_path):
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        assert open_files(place).root == tmp_path
    with pytest.raises(ittt.UserError, match="sftp:// cannot create a file only if there is none"):
        open_files("sftp://host/sessions")
    if find_spec("s3fs") is None:
        with pytest.raises(ittt.UserError, match="s3fs"):
            open_files("s3://bucket/sessions")


def test_of_two_who_create_one_succeeds(files):
    def create(n: int) -> bool:
        try:
            files.create("folder/blob", b"%d" % n)
        except ExistsError:
            return False
        return True

    made = [create(n) for n in range(8)]
    assert made == [True, *[False] * 7]
    assert files.read("folder/blob") == b"0"


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_sessions_in_an_object_store(request, start, tmp_path, store):
    """Two servers on one, restarts, states and the journal."""
    place = f"{request.getfixturevalue('s3') if store == 's3' else 'memory:/'}/{tmp_path.name}"
    want = session()
    first, second = start(place), start(place)
    first.http().post("/v1/sessions", json={"id": "s"})
    for server, text in ((first, TEXT[:50]), (second, TEXT[50:90]), (first, TEXT[90:130])):
        assert server.http().post("/v1/sessions/s/read", json={"text": text}).status_code == 200
        want.read(text)
    assert write(second, "s") == want.generate("It was", max_new_tokens=5)
    second.http().post("/v1/sessions/s/save")
    first.stop()
    second.stop()
    third = start(place)
    assert write(third, "s") == want.generate("It was", max_new_tokens=5)
    third.http().delete("/v1/sessions/s")
    assert third.http().get("/v1/sessions").json()["data"] == []


# -- the command -------------------------------------------------------------------------------------------------------


def command(state: Path, *more: str):
    """The real thing, with the shipped model: its process, address and curl line."""
    program = [sys.executable, "-m", "inplace_ttt", "serve", "--port", "0", "--state-dir", str(state), *more]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("curl "):
            break
    url = re.search(r"http://127.0.0.1:\d+", lines[0]).group()
    return process, url, lines[-1]


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_killed_while_it_reads_then_stopped_in_order(tmp_path):
    text = (Path(ittt.__file__).parent / "session" / "session.py").read_text() * 4
    process, url, curl = command(tmp_path)
    try:
        seconds = cpu_seconds(process.pid)
        assert seconds < 3  # of about 8 until the model is loaded
        http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json() == {"status": "loading"}
        said = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True).stdout
        own = ittt.Session(shipped(torch.float32), tokenizer())
        assert json.loads(said)["choices"][0]["text"] == own.generate(
            "class Reader:\n    def __init__(self", max_new_tokens=24
        )
        assert http.get("/ready").status_code == 200
        http.post("/v1/sessions", json={"id": "book"})
        with http.stream("POST", "/v1/sessions/book/read", json={"text": text, "stream": True}) as response:
            progress = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            told = json.loads(next(islice(progress, 2, None)))
            process.send_signal(signal.SIGKILL)
        process.wait(10)
    finally:
        process.kill()
    with Running(tmp_path, shipped_model=True) as server:
        found = server.http().get("/v1/sessions/book").json()
        pieces = found["version"]
        assert told["version"] <= pieces < len(text) / 2048
        assert found["stats"]["tokens"] >= told["tokens"]
        want = ittt.Session(shipped(torch.float32), tokenizer(), probe_every=0)
        for at in range(pieces):
            want.read(text[2048 * at : 2048 * (at + 1)])
        assert found["stats"]["tokens"] == want.stats().tokens
        assert write(server, "book", "\n    def ", 20) == want.generate("\n    def ", max_new_tokens=20)
    store = Store(LocalFiles(tmp_path))
    record = store.record(store.key("local", "book"))
    assert record.entries == []  # all of it is in the stored state
    assert record.state.version == pieces + 2


def test_stopped_in_order(start):
    """What runs is ended after the grace and stored; the process would exit with 0, not by the signal."""
    server = start(limits={"grace": 0.3})
    server.http().post("/v1/sessions", json={"id": "book"})
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4000, "stream": True, "temperature": 1.5}
    with server.http().stream("POST", "/v1/completions", json=body, headers={"x-session-id": "book"}) as response:
        lines = response.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    server.thread.join(60)
    assert not server.server._captured_signals
    record = server.engine.store.record(server.engine.store.key("local", "book"))
    assert record.entries == []
    assert record.version > 1


def test_an_answer_that_is_cut_off_is_cancelled_on_its_own_route(start):
    """What OpenAI's routes call "length", since their clients know no other word for an answer that is not complete."""
    server = start(limits={"grace": 0.3})
    server.http().post("/v1/sessions", json={"id": "book"})
    body = {"question": "x", "max_tokens": 4000, "stream": True, "temperature": 1.5}
    with server.http().stream("POST", "/v1/sessions/book/ask", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.server.handle_exit(signal.SIGTERM, None)
        *_, last, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["done"]["finish_reason"] == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "anybody could use this server"),
        (["--api-keys", "short"], "line 2: write owner:key"),
        (["--api-keys", "twice"], "line 2: this key is there already"),
        (["--api-keys", "missing"], "cannot read the keys"),
        (["--api-keys", "empty"], "holds no keys"),
        (["--chunk-size", "64"], "chunk_size: for a plain model"),
        (["--objective", "nonsense"], "objective"),
        (["--state", "sparse"], "--state sparse"),
        (["--window", "3"], "window"),
        (["nowhere/at/all/model"], "model"),
        (["--learn", "some"], "one of all, read, written, none or frozen"),
        (["--learn", "read"], 'needs a model with objective "loss"'),
        (["--state-dir", "sftp://host/place"], "cannot create a file only if there is none"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_mistakes_on_the_command_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("short", "# mine\nada:x"), ("twice", "a:12345678\nb:12345678"), ("empty", "\n")):
        Path(name).write_text(text)
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, ["serve", "--port", "0", *arguments])
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_port_is_taken(server, tmp_path):
    result = CliRunner().invoke(app, ["serve", "--port", str(server.port)])
    assert result.exit_code == 2
    assert "in use" in result.output
