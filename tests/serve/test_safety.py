"""Owners, limits, broken and slow clients: refused in OpenAI's form, and nobody else notices."""

import asyncio
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.running import LIMITS, OPTIONS, Running, model, session
from session.models import TEXT, tokenizer

from inplace_ttt import UserError
from inplace_ttt.serve.app import make_app
from inplace_ttt.serve.guard import Guard, read_keys
from inplace_ttt.serve.scheduler import SMALL
from inplace_ttt.serve.service import make_service
from inplace_ttt.serve.settings import Limits

KEYS = {"ada-key-1": "ada", "ada-key-2": "ada", "eve-key-1": "eve"}


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    with Running(tmp_path_factory.mktemp("state"), keys=KEYS) as running:
        yield running


def refused(response, status: int) -> str:
    """The message of an error in OpenAI's form; nothing of the server's inside is in it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for inside in ("Traceback", "/tmp", "site-packages", 'File "'):
        assert inside not in response.text
    return error["message"]


# -- owners ------------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_goes(owned):
    for key in (None, "wrong", "ada", "\u00e4"):
        headers = {"authorization": f"Bearer {key}".encode()} if key else {}
        for path in ("/v1/models", "/v1/sessions", "/v1/sessions/x", "/v1/nothing"):
            assert "API key" in refused(owned.http().get(path, headers=headers), 401)
    assert "API key" in refused(owned.http().post("/v1/completions", content=b"\xff" * 1000), 401)
    with pytest.raises(openai.AuthenticationError):
        owned.openai("wrong").models.list()
    for path in ("/health", "/ready", "/metrics", "/"):
        assert owned.http().get(path).status_code == 200


def test_sessions_belong_to_their_owner(owned):
    ada, eve = owned.http("ada-key-1"), owned.http("eve-key-1")
    assert ada.post("/v1/sessions", json={"id": "diary"}).status_code == 201
    ada.post("/v1/sessions/diary/read", json={"text": "my secret is Rosebud. " * 5})
    ada.post("/v1/sessions/diary/save")
    assert [s["id"] for s in owned.http("ada-key-2").get("/v1/sessions").json()["data"]] == ["diary"]
    assert eve.get("/v1/sessions").json()["data"] == []
    nobody = [refused(eve.get("/v1/sessions/never-made"), 404).replace("never-made", "diary")]
    for method, path, body in (
        ("GET", "", None), ("DELETE", "", None), ("GET", "/file", None), ("POST", "/read", {"text": "x"}),
        ("POST", "/score", {"text": "Rosebud"}), ("POST", "/ask", {"question": "x"}), ("POST", "/fork", {}),
        ("POST", "/reset", {}), ("POST", "/freeze", {}), ("POST", "/save", {}), ("POST", "/rollback", {}),
        ("POST", "/export", {}),
    ):  # fmt: skip
        nobody.append(refused(eve.request(method, f"/v1/sessions/diary{path}", json=body), 404))
    with pytest.raises(openai.NotFoundError):
        owned.openai("eve-key-1", session="diary").completions.create(model="tiny", prompt="x")
    assert len(set(nobody)) == 1  # nothing tells somebody else's session from none
    assert eve.post("/v1/sessions", json={"id": "diary"}).status_code == 201  # her own
    assert eve.get("/v1/sessions/diary").json()["stats"]["tokens"] == 0
    eve.delete("/v1/sessions/diary")
    assert ada.get("/v1/sessions/diary").json()["stats"]["tokens"] > 0


def test_many_sessions_at_once_hold_no_canary_of_another(owned):
    """Each says exactly what it says alone, while plain requests run among them."""
    secrets = [f"{n}{n}{n} canary {n * 7919} sings {chr(65 + n) * 3}. " * (2 + n % 3) for n in range(6)]

    def one(n: int) -> list[str]:
        key = list(KEYS)[n % 3]
        http = owned.http(key)
        name = http.post("/v1/sessions").json()["id"]
        http.post(f"/v1/sessions/{name}/read", json={"text": secrets[n]})
        client = owned.openai(key)
        said = []
        for header in ({"x-session-id": name}, {}, {"x-session-id": name}):
            found = client.completions.create(
                model="tiny", prompt="canary", max_tokens=5, temperature=0, extra_headers=header
            )
            said.append(found.choices[0].text)
        http.delete(f"/v1/sessions/{name}")
        return said

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(one, range(6)))
    plain = session().generate("canary", max_new_tokens=5)
    for n, secret in enumerate(secrets):
        s = session()
        s.read(secret)
        assert said[n] == [s.generate("canary", max_new_tokens=5), plain, s.generate("canary", max_new_tokens=5)]


def test_keys_file(tmp_path):
    path = tmp_path / "keys"
    path.write_text("# ours\n ada : 12345678 \n\nada:abcdefgh\neve:a:b:c:d:e\n")
    assert sorted(read_keys(path).values()) == ["ada", "ada", "eve"]
    path.write_text("ada 12345678")
    with pytest.raises(UserError, match="line 1"):
        read_keys(path)


def test_other_web_pages_are_refused(server, owned):
    assert "other web pages" in refused(server.http().get("/v1/models", headers={"origin": "http://evil.test"}), 403)
    assert server.http().get("/v1/models", headers={"origin": server.url}).status_code == 200
    assert "loopback" in refused(server.http().get("/v1/models", headers={"host": "evil.test"}), 403)
    same = {"host": "model.example", "origin": "https://model.example"}
    assert owned.http("ada-key-1").get("/v1/models", headers=same).status_code == 200  # behind a proxy


# -- limits ------------------------------------------------------------------------------------------------------------


def test_limits(start):
    limits = {"body": 3000, "prompt": 20, "sessions": 2, "rate": 30, "new_tokens": 6, "choices": 2}
    server = start(limits=limits)
    http = server.http()
    assert "larger than 3,000" in refused(http.post("/v1/sessions", json={"id": "x" * 4000}), 413)
    assert "larger" in refused(http.post("/v1/completions", content=(b"x" * 1000 for _ in range(9))), 413)
    assert "20" in refused(http.post("/v1/completions", json={"model": "tiny", "prompt": "a b " * 90}), 400)
    got = http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1000, "temperature": 1})
    assert got.json()["usage"]["completion_tokens"] <= 6
    for _ in range(2):
        assert http.post("/v1/sessions").status_code == 201
    full = http.post("/v1/sessions")
    assert "2 sessions" in refused(full, 429)
    assert int(full.headers["retry-after"]) >= 1
    statuses = [http.get("/v1/models").status_code for _ in range(40)]
    assert statuses.count(429) > 5
    assert int(http.get("/v1/models").headers["retry-after"]) >= 1
    assert http.get("/health").status_code == 200


def test_more_than_fit_wait_or_are_told_when_to_come_back(start):
    server = start(limits={"batch": 1, "queue": 2})
    body = {"model": "tiny", "prompt": "It was", "max_tokens": 40, "temperature": 0}
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda _: server.http().post("/v1/completions", json=body), range(9)))
    good = [a.json()["choices"][0]["text"] for a in answers if a.status_code == 200]
    assert set(good) == {session().generate("It was", max_new_tokens=40)}
    assert 3 <= len(good) < 9
    for answer in answers:
        if answer.status_code != 200:
            assert "too many" in refused(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1


def test_memory_in_use_is_not_taken_away(start):
    """A session that writes keeps its memory; who finds none is told so."""
    server = start(limits={"memory": 1, "patience": 0.2})
    for name in ("a", "b"):
        server.http().post("/v1/sessions", json={"id": name})
    first = server.openai(session="a").completions.create(
        model="tiny", prompt="It was", max_tokens=3000, temperature=0, stream=True
    )
    next(iter(first))
    with pytest.raises(openai.RateLimitError, match="memory"):
        server.openai(session="b").completions.create(model="tiny", prompt="x")
    first.close()
    until = time.monotonic() + 20
    while server.engine.jobs and time.monotonic() < until:
        time.sleep(0.05)
    got = server.openai(session="b").completions.create(model="tiny", prompt="It was", max_tokens=3, temperature=0)
    assert got.choices[0].text == session().generate("It was", max_new_tokens=3)


def test_a_long_read_does_not_starve_a_stream(server):
    """Between two tokens of a stream there is at most one piece of reading."""
    http, order = server.http(), []
    for name in ("long", "stream"):
        http.post("/v1/sessions", json={"id": name})
    watch = server.engine.scheduler.watch

    class Watch:
        def step(self, rows, seconds):
            order.append(None)

        def call(self, seconds):
            order.append(seconds)

    server.engine.scheduler.watch = Watch()
    try:
        reader = threading.Thread(target=lambda: http.post("/v1/sessions/long/read", json={"text": TEXT * 6}))
        stream = server.openai(session="stream").completions.create(
            model="tiny", prompt="It was", max_tokens=40, stream=True
        )
        next(iter(stream))
        reader.start()
        list(stream)
        reader.join()
    finally:
        server.engine.scheduler.watch = watch
    gaps = [[]]
    for what in order:
        gaps.append([]) if what is None else gaps[-1].append(what)
    during = [gap for gap in gaps[1:-1] if gap]
    assert len(during) >= 5
    assert all(sum(gap[:-1]) < 1.5 * SMALL for gap in during)  # only the last piece of a gap may take longer


# -- clients that break off --------------------------------------------------------------------------------------------


def test_a_client_that_leaves_stops_its_answer(server):
    server.http().post("/v1/sessions", json={"id": "left"})
    options = {"model": "tiny", "max_tokens": 4000, "temperature": 0, "prompt": "It was"}
    stream = server.openai(session="left").completions.create(stream=True, **options)
    next(iter(stream))
    stream.close()
    stopped = server.openai(session="left").with_options(timeout=1)
    with pytest.raises(openai.APITimeoutError):
        stopped.completions.create(**options)
    found = server.http().get("/v1/sessions/left").json()["stats"]
    assert 1 <= found["written"] < 2000
    assert found["tokens"] > found["written"]
    s = session()  # what was written before it stopped is learned, no more and no less
    s.read("It was")
    want, more = s.generate_ids(max_new_tokens=found["written"] + 3), found["written"]
    read = server.http().get("/v1/sessions/left").json()["stats"]["tokens"] - more
    assert read in (2, 4)  # the prompt, once or twice: the second request came or did not come to it
    if read == 2:
        got = server.openai(session="left").completions.create(model="tiny", prompt="", max_tokens=3, temperature=0)
        assert got.choices[0].text == tokenizer().decode(want[more:])


def test_slow_and_silent_clients_are_cut_off(start):
    server = start(limits={"slow": 0.5})
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"content-length: 500\r\n\r\n{"
        )
        said = b""
        while part := slow.recv(4096):
            said += part
        assert b" 408 " in said
    body = json.dumps({"model": "tiny", "prompt": "It was", "max_tokens": 3, "logprobs": 20, "stream": True})
    for listening in server.server.servers[0].sockets:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as deaf:  # takes nothing of a long answer
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.connect(("127.0.0.1", server.port))
        big = body.replace('"max_tokens": 3', '"max_tokens": 4000')
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        deaf.sendall(f"{head}content-length: {len(big)}\r\n\r\n{big}".encode())
        time.sleep(0.3)
        assert server.http().post("/v1/completions", content=body, headers=JSON).status_code == 200
        until = time.monotonic() + 40
        while server.engine.jobs and time.monotonic() < until:
            time.sleep(0.1)
        assert not server.engine.jobs  # stopped long before 4,000 tokens


def test_a_body_that_is_cut_off_is_asked_for_again(tmp_path):
    """Behind a proxy the client still waits: it has to know that the request may be sent again."""
    made = make_service(model(), tokenizer(), "tiny", tmp_path, Limits(**LIMITS), **OPTIONS)
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"40")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    part = {"type": "http.request", "body": b'{"mo', "more_body": True}

    async def ask(guard: Guard, *messages: dict[str, Any]) -> list[dict[str, Any]]:
        left, said = list(messages), []

        async def receive() -> dict[str, Any]:
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            said.append(message)

        await guard(dict(scope), receive, send)
        return said

    async def both() -> list[list[dict[str, Any]]]:
        guard = Guard(lambda: make_app(made), made.engine.limits, None)
        guard.loading = asyncio.ensure_future(guard._load())
        found = [await ask(guard), await ask(guard, part)]
        await made.engine.stop()
        return found

    for start, body in asyncio.run(both()):
        assert start["status"] == 408
        assert json.loads(body["body"])["error"]["code"] == "incomplete"


JSON = {"content-type": "application/json"}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = (
    "model",
    "prompt",
    "messages",
    "max_tokens",
    "n",
    "stop",
    "text",
    "id",
    "stream",
    "seed",
    "logprobs",
    "if_version",
    "learn",
    "frozen",
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | VALUES
PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/sessions", "/v1/sessions/kept/read", "/v1/sessions/kept/score",
    "/v1/sessions/kept/ask", "/v1/sessions/kept/rollback", "/v1/sessions/kept/export", "/v1/sessions/..%2f..%2fx/read",
    "/v1/sessions/kept/fork", "/nowhere",
)  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(("x-session-id", "x-session-version", "x-session-learn", "accept", "x-request-id")),
    st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=80) | st.sampled_from(("kept", "2", "all")),
    max_size=3,
)


@pytest.fixture(scope="module")
def kept(server):
    server.http().post("/v1/sessions", json={"id": "kept"})
    server.http().post("/v1/sessions/kept/read", json={"text": TEXT[:80]})
    server.http().post("/v1/sessions/kept/freeze")
    return server.http()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), body=BODIES, headers=HEADERS)
def test_garbage_in_json(kept, path, body, headers):
    answer = kept.post(path, content=json.dumps(body).encode(), headers=headers | JSON)
    assert answer.status_code < 500, (path, body, answer.text)
    if answer.status_code >= 400:
        refused(answer, answer.status_code)


def test_garbage_bytes(kept, server):
    rng = random.Random(0)
    for n in range(60):
        data = rng.randbytes(rng.choice((0, 1, 10, 1000)))
        kind = rng.choice(
            ("application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain", "")
        )
        answer = kept.post(PATHS[n % len(PATHS)], content=data, headers={"content-type": kind})
        assert answer.status_code == 201 or 400 <= answer.status_code < 500, (kind, data, answer.text)
    for head in (
        b"\x16\x03\x01" * 50,
        b"GET / HTTP/1.1\r\n\r\n" + b"x" * 9,
        b"POST /v1/sessions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            raw.sendall(head)
            assert raw.recv(100)[:12] in (b"HTTP/1.1 400", b"")
    deep = b"[" * 100_000
    assert 400 <= kept.post("/v1/completions", content=deep, headers=JSON).status_code < 500
    surrogate = b'{"text": "\\ud800"}'
    assert 400 <= kept.post("/v1/sessions/kept/score", content=surrogate, headers=JSON).status_code < 500
    found = kept.get("/v1/sessions/kept").json()
    assert (found["version"], found["frozen"]) == (2, True)
    s = session()
    s.read(TEXT[:80])
    got = server.openai(session="kept").completions.create(model="tiny", prompt="It", max_tokens=5, temperature=0)
    assert got.choices[0].text == s.generate("It", max_new_tokens=5)


def test_uploads_that_are_no_text(kept):
    kept.post("/v1/sessions/kept/freeze", json={"frozen": False})
    for data, says in ((b"\0\1\2", "binary"), (b"caf\xe9", "UTF-8"), (b"\xff\xfeh\0i\0", "binary")):
        assert says in refused(kept.post("/v1/sessions/kept/read", files={"file": data}), 400)
    assert kept.get("/v1/sessions/kept").json()["version"] == 3
    kept.post("/v1/sessions/kept/freeze")


def form(part: bytes, boundary: bytes = b"b") -> bytes:
    return b'--%s\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n%s' % (boundary, part)


def test_broken_uploads(kept, server):
    kept.post("/v1/sessions/kept/freeze", json={"frozen": False})
    version = kept.get("/v1/sessions/kept").json()["version"]
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for route in ("/v1/sessions/kept/read", "/v1/sessions"):
        fields = b"".join(b'--b\r\ncontent-disposition: form-data; name="%d"\r\n\r\nx\r\n' % n for n in range(99))
        for body in (
            form(b"no end"), form(b"another", b"c") + b"\r\n--c--\r\n", b"--b\r\n\r\n--b--\r\n", b"\r\n" * 99,
            fields + b"--b--\r\n", b"",
        ):  # fmt: skip
            refused(kept.post(route, content=body, headers=kind), 400)
    head = b"POST /v1/sessions/kept/read HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:  # leaves in the middle
        raw.sendall(head + b"content-type: multipart/form-data; boundary=b\r\n\r\n" + form(b"half of it"))
    time.sleep(0.2)
    assert kept.get("/v1/sessions/kept").json()["version"] == version
    kept.post("/v1/sessions/kept/freeze")


def test_a_stream_beside_all_this_is_not_disturbed(server):
    """Garbage, huge and broken bodies, clients that leave: meanwhile a session writes what it writes alone."""
    http, stop, statuses = server.http(), threading.Event(), []
    http.post("/v1/sessions", json={"id": "calm"})
    http.post("/v1/sessions/calm/read", json={"text": TEXT})

    def bother(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            data = rng.choice((b"{", b"[" * 50_000, rng.randbytes(3000), b"x" * (17 << 20), form(b"half")))
            kind = rng.choice(("application/json", "multipart/form-data; boundary=b"))
            path = rng.choice((*PATHS, "/v1/sessions/calm/read"))
            statuses.append(http.post(path, content=data, headers={"content-type": kind}).status_code)
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
                raw.sendall(b"POST /v1/sessions/calm/read HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{")

    s = session()
    s.read(TEXT)
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(bother, n) for n in range(3)]
        try:
            client = server.openai(session="calm")
            for _ in range(3):
                got = client.completions.create(
                    model="tiny", prompt="It was", max_tokens=40, temperature=0, stream=True
                )
                assert "".join(chunk.choices[0].text for chunk in got) == s.generate("It was", max_new_tokens=40)
        finally:
            stop.set()
        for job in jobs:
            job.result()
    assert len(statuses) > 5
    assert all(400 <= status < 500 for status in statuses), statuses
