"""What a session learns: of what it reads, of what it writes, by server, by session and by request."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from serve.running import session
from serve.test_equal import alone, read, write
from session.models import TEXT, ids_of

from inplace_ttt.errors import UserError
from inplace_ttt.serve.settings import LEARN
from inplace_ttt.session.writing import read_exactly

PIECES, PROMPT, MOST = (TEXT[:300], TEXT[300:420]), "It was", 20


def fed(s, text: str, learned: bool) -> None:
    s.read(text) if learned else read_exactly(s, ids_of(text), False, True)


def library(learn: str):
    """A session that reads both pieces and writes, which of the library's own ways comes closest."""
    reads, writes = LEARN[learn]
    s = session("loss", learn="all" if writes else "read")
    for piece in PIECES:
        fed(s, piece, reads)
    fed(s, PROMPT, reads)
    return s, s.generate(max_new_tokens=MOST)


def served(server, learn: str | None, **made):
    """The same over HTTP: id and what was written."""
    http = server.http()
    name = http.post("/v1/sessions", json={"learn": learn, **made}).json()["id"]
    for piece in PIECES:
        answer = http.post(f"/v1/sessions/{name}/read", json={"text": piece})
        assert answer.status_code == 200, answer.text
        assert answer.json()["complete"]
        assert answer.json()["characters"] == len(piece)
    return name, continued(server, name)


def continued(server, name: str, prompt: str = PROMPT, most: int = MOST, **headers) -> str:
    headers = {f"x-session-{key}": value for key, value in {"id": name, **headers}.items()}
    body = {"model": "tiny", "prompt": prompt, "max_tokens": most, "temperature": 0}
    answer = server.http().post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def score(server, name: str) -> float:
    return server.http().post(f"/v1/sessions/{name}/score", json={"text": TEXT[420:]}).json()["mean"]


def test_a_session_learns_what_it_is_told_to(start):
    """Equal to the library, also from the journal alone and from a stored state."""
    first, means = start(objective="loss"), {}
    want = {learn: library(learn) for learn in LEARN}
    names = {}
    for learn, (s, text) in want.items():
        names[learn], got = served(first, learn)
        assert got == text
        means[learn] = score(first, names[learn])
        assert means[learn] == pytest.approx(s.score(TEXT[420:]).mean, abs=1e-9)
        assert first.http().get(f"/v1/sessions/{names[learn]}").json()["learn"] == learn
    assert len({round(mean, 6) for mean in means.values()}) == len(LEARN)
    other = start(objective="loss")  # which has the journal alone
    for learn, name in names.items():
        assert score(other, name) == pytest.approx(means[learn], abs=1e-9)
    first.stop()
    other.stop()
    stored = start(objective="loss")
    for learn, (s, _) in want.items():
        assert stored.http().get(f"/v1/sessions/{names[learn]}").json()["learn"] == learn
        reads, _ = LEARN[learn]
        fed(s, " and so", reads)
        assert continued(stored, names[learn], " and so") == s.generate(max_new_tokens=MOST)
        twin = stored.http().post(f"/v1/sessions/{names[learn]}/fork").json()["id"]
        assert stored.http().get(f"/v1/sessions/{twin}").json()["learn"] == learn


def test_a_request_says_what_is_learned(start):
    server = start(objective="loss")
    name = server.http().post("/v1/sessions").json()["id"]
    s = session("loss", learn="all")
    fed(s, TEXT[:300], False)
    fed(s, PROMPT, False)
    want = s.generate(max_new_tokens=MOST)
    none = {"text": TEXT[:300], "learn": "none"}
    assert server.http().post(f"/v1/sessions/{name}/read", json=none).status_code == 200
    assert continued(server, name, learn="written") == want
    assert score(server, name) == pytest.approx(s.score(TEXT[420:]).mean, abs=1e-9)
    plain = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    blank = session("loss")
    fed(blank, TEXT, False)
    said = [
        server.http().post("/v1/completions", json=plain, headers=headers).json()["choices"][0]
        for headers in ({"x-session-learn": "none"}, {})
    ]
    assert said[0]["text"] == blank.generate(max_new_tokens=8)
    numbers = [each["logprobs"]["token_logprobs"] for each in said]
    assert numbers[0] != pytest.approx(numbers[1], rel=1e-3)
    wrong = server.http().post("/v1/completions", json=plain, headers={"x-session-learn": "some"})
    assert wrong.status_code == 400


@pytest.mark.parametrize("learn", ["read", "all", "none", "frozen"])
def test_what_the_server_says_holds_for_new_sessions(start, learn):
    server = start(objective="loss", learn=learn)
    made = server.http().post("/v1/sessions").json()
    assert (made["learn"], made["frozen"]) == (("read", True) if learn == "frozen" else (learn, False))
    refused = server.http().post(f"/v1/sessions/{made['id']}/read", json={"text": TEXT}).status_code
    assert refused == (409 if learn == "frozen" else 200)
    _, got = served(server, None, frozen=False)
    assert got == library(made["learn"])[1]


def test_models_that_learn_all_that_they_read_say_so(server):
    http = server.http()
    assert http.post("/v1/sessions", json={"id": "all", "learn": "all"}).status_code == 201
    none = {"text": "x", "learn": "none"}
    body, headers = {"model": "tiny", "prompt": "x"}, {"x-session-learn": "read", "x-session-id": "all"}
    refused = [http.post("/v1/sessions", json={"learn": learn}) for learn in ("read", "written", "none")]
    refused += [http.post("/v1/sessions/all/read", json=none), http.post("/v1/completions", json=body, headers=headers)]
    del headers["x-session-id"]
    refused.append(http.post("/v1/completions", json=body, headers=headers))
    for answer in refused:
        assert answer.status_code == 400, answer.text
        assert 'needs a model with objective "loss"' in answer.json()["error"]["message"]
    assert http.get("/v1/sessions/all").json()["version"] == 0


def test_a_server_refuses_what_its_model_cannot_do(start):
    with pytest.raises(UserError, match="objective"):
        start(learn="read")
    with pytest.raises(UserError, match="learn 'some': one of all, read, written, none or frozen"):
        start(objective="loss", learn="some")


def test_eight_sessions_with_the_loss_interleaved_and_from_disk(start):
    limits = {"memory": 600_000, "patience": 60}
    want = [alone(i, objective="loss") for i in range(8)]
    server = start(objective="loss", limits=limits)
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda i: read(server, i), range(8)))
        first = list(pool.map(lambda i: write(server, names[i], i, 0), range(8)))
        server.stop()
        again = start(objective="loss", limits=limits)
        second = list(pool.map(lambda i: write(again, names[i], i, 1), range(8)))
    assert [list(texts) for texts in zip(first, second, strict=True)] == want
