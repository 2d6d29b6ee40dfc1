"""Over HTTP a session says what it says in the library: interleaved, evicted, restarted, forked."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve.running import events, session
from session.models import TEXT, ids_of

PROMPTS = ["It was", " the whale", "def", " and", " so"]


def texts(i: int) -> list[str]:
    """What session i reads, in pieces of no particular length."""
    text = (TEXT + TEXT)[7 * i :][: 60 + 12 * i]
    return [text[: 11 + 3 * i], text[11 + 3 * i :]][: 1 + i % 2]


def alone(i: int, rounds: int = 2, **changes) -> list[str]:
    s = session(**changes)
    for part in texts(i):
        s.read(part)
    return [s.generate(PROMPTS[(i + n) % 5], max_new_tokens=4 + i % 5) for n in range(rounds)]


def read(server, i: int) -> str:
    with server.http() as http:
        name = http.post("/v1/sessions").json()["id"]
        for part in texts(i):
            assert http.post(f"/v1/sessions/{name}/read", json={"text": part}).status_code == 200
    return name


def write(server, name: str, i: int, n: int) -> str:
    client = server.openai(session=name)
    prompt, most = PROMPTS[(i + n) % 5], 4 + i % 5
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=most, temperature=0)
    return found.choices[0].text


@pytest.fixture(scope="module")
def expected() -> list[list[str]]:
    return [alone(i) for i in range(16)]


@pytest.mark.parametrize("memory", ["all fit", "few fit"])
def test_sixteen_interleaved_sessions_and_a_restart(start, expected, memory):
    limits = {} if memory == "all fit" else {"memory": 600_000, "patience": 60}
    server = start(limits=limits)
    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda i: read(server, i), range(16)))
        first = list(pool.map(lambda i: write(server, names[i], i, 0), range(16)))
    assert first == [texts[0] for texts in expected]
    until = time.monotonic() + 10
    while server.engine.bytes > server.engine.budget and time.monotonic() < until:
        time.sleep(0.05)
    loaded = len(server.engine.loaded)
    assert loaded == 16 if memory == "all fit" else 0 < loaded < 8, server.engine.bytes
    server.stop()
    server = start(limits=limits)
    assert not server.engine.loaded
    with ThreadPoolExecutor(16) as pool:
        second = list(pool.map(lambda i: write(server, names[i], i, 1), range(16)))
    assert second == [texts[1] for texts in expected]


def test_sixteen_sessions_taken_over_by_another_server_and_forked(start, expected):
    """The first server is not stopped: what it has in memory alone is in the journal, too."""
    first = start(limits={"unsaved": 100})
    with ThreadPoolExecutor(16) as pool:
        names = list(pool.map(lambda i: read(first, i), range(16)))
        wrote = list(pool.map(lambda i: write(first, names[i], i, 0), range(16)))
        second = start()
        forks = list(pool.map(lambda name: second.http().post(f"/v1/sessions/{name}/fork").json()["id"], names))
        # Forks and the sessions themselves go on at the same time, on different servers.
        going = [pool.submit(write, second, names[i], i, 1) for i in range(16)]
        going += [pool.submit(write, first, forks[i], i, 1) for i in range(16)]
        later = [each.result() for each in going]
    assert wrote == [texts[0] for texts in expected]
    assert later == [texts[1] for texts in expected] * 2


def test_fork_goes_its_own_way(server):
    with server.http() as http:
        name = read(server, 3)
        twin = http.post(f"/v1/sessions/{name}/fork").json()["id"]
        http.post(f"/v1/sessions/{twin}/read", json={"text": TEXT})
    own = session()
    for part in texts(3):
        own.read(part)
    other = own.fork()
    other.read(TEXT)
    for id, s in ((twin, other), (name, own)):
        assert write(server, id, 3, 0) == s.generate(PROMPTS[3], max_new_tokens=7)


def test_token_ids_stop_strings_and_sampling(server):
    http, client = server.http(), server.openai()
    ids = ids_of(TEXT)[:30]
    s = session()
    s.read(ids[:17])
    http.post("/v1/sessions", json={"id": "ids"})
    options = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
    more = {"top_k": 40, "repetition_penalty": 1.2}
    s.generate(ids[17:], max_new_tokens=9, **options, **more)
    want = s.generate(None, max_new_tokens=30, stop=["e"])
    for part in (ids[:17], ids[17:]):
        most = 0 if part == ids[:17] else 9
        got = client.completions.create(
            model="tiny",
            prompt=part,
            max_tokens=most,
            extra_headers={"x-session-id": "ids"},
            extra_body=more,
            **options,
        )
    got = client.completions.create(
        model="tiny", prompt="", max_tokens=30, temperature=0, stop="e", extra_headers={"x-session-id": "ids"}
    )
    assert got.choices[0].text == want
    assert got.choices[0].finish_reason == ("length" if got.usage.completion_tokens == 30 else "stop")
    stats = http.get("/v1/sessions/ids").json()["stats"]
    assert stats["tokens"] == s.stats().tokens
    assert stats["updates"] == s.stats().updates


def test_score_and_ask_leave_no_trace(server):
    s = session()
    for part in texts(5):
        s.read(part)
    name = read(server, 5)
    with server.http() as http:
        before = http.get(f"/v1/sessions/{name}").json()
        found = http.post(f"/v1/sessions/{name}/score", json={"text": TEXT[:90], "losses": True}).json()
        want = s.score(TEXT[:90])
        assert found["losses"] == pytest.approx(list(want.losses))
        assert found["mean"] == pytest.approx(want.mean)
        asked = http.post(f"/v1/sessions/{name}/ask", json={"question": "It was", "max_tokens": 12}).json()
        assert asked["answer"] == s.ask("It was", max_new_tokens=12)
        asked = http.post(f"/v1/sessions/{name}/ask", json={"question": "It was", "max_tokens": 12, "stream": True})
        pieces = events(asked)
        assert "".join(piece.get("piece", "") for piece in pieces) == s.ask("It was", max_new_tokens=12)
        assert http.get(f"/v1/sessions/{name}").json() == before


def test_without_a_session_nothing_is_learned(server):
    client = server.openai()
    blank = session().generate(TEXT[:50], max_new_tokens=10)
    for _ in range(3):
        client.completions.create(model="tiny", prompt=TEXT, max_tokens=4)
        got = client.completions.create(model="tiny", prompt=TEXT[:50], max_tokens=10, temperature=0)
        assert got.choices[0].text == blank


def test_several_prompts_and_choices(server):
    client = server.openai()
    got = client.completions.create(model="tiny", prompt=PROMPTS[:3], max_tokens=6, n=2, temperature=0)
    want = [session().generate(prompt, max_new_tokens=6) for prompt in PROMPTS[:3]]
    assert [choice.text for choice in got.choices] == [text for text in want for _ in range(2)]
    assert [choice.index for choice in got.choices] == list(range(6))
    got = client.completions.create(model="tiny", prompt="It was", max_tokens=12, n=3, temperature=1.5, seed=1)
    want = [session().generate("It was", max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 2, 3)]
    assert [choice.text for choice in got.choices] == want


def test_frozen_sessions_answer_and_learn_nothing(server):
    s = session()
    for part in texts(7):
        s.read(part)
    name = read(server, 7)
    with server.http() as http:
        http.post(f"/v1/sessions/{name}/freeze")
        stats = http.get(f"/v1/sessions/{name}").json()
        assert stats["frozen"]
        for _ in range(2):
            assert write(server, name, 7, 0) == s.fork().generate(PROMPTS[2], max_new_tokens=6)
        for action, body in (("read", {"text": "x"}), ("reset", {}), ("rollback", {})):
            refused = http.post(f"/v1/sessions/{name}/{action}", json=body)
            assert refused.status_code == 409
            assert "frozen" in refused.json()["error"]["message"]
        assert http.get(f"/v1/sessions/{name}").json() == stats
        http.post(f"/v1/sessions/{name}/freeze", json={"frozen": False})
    assert [write(server, name, 7, n) for n in range(2)] == alone(7)


def test_state_in_pairs(start, expected):
    server = start(state="auto")
    for i in (2, 9):
        name = read(server, i)
        assert [write(server, name, i, n) for n in range(2)] == expected[i]
