"""A server listens at once and answers when its model is loaded."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serve.running import session

from inplace_ttt.errors import UserError
from inplace_ttt.serve import guard


@pytest.fixture
def slow(start):
    """A server that loads when ``go`` is set, or fails then."""

    def begin(error: Exception | None = None):
        go = threading.Event()

        def load():
            go.wait(30)
            if error:
                raise error
            return server.app()

        server = start(load=load)
        server.go = go
        return server

    return begin


BODY = {"model": "tiny", "prompt": "It was", "max_tokens": 5, "temperature": 0}


def test_requests_wait_until_it_is_loaded(slow):
    loading = slow()
    http = loading.http()
    assert http.get("/health").status_code == 200
    not_yet = http.get("/ready")
    assert (not_yet.status_code, not_yet.json()) == (503, {"status": "loading"})
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(http.post, "/v1/completions", json=BODY) for _ in range(3)]
        time.sleep(0.2)
        assert not any(answer.done() for answer in answers)
        loading.go.set()
        texts = {answer.result().json()["choices"][0]["text"] for answer in answers}
    assert texts == {session().generate("It was", max_new_tokens=5)}
    assert http.get("/ready").json() == {"status": "ready"}


def test_who_waits_too_long_is_told_to_come_again(slow, monkeypatch):
    monkeypatch.setattr(guard, "LOADING", 0.1)
    loading = slow()
    answer = loading.http().post("/v1/completions", json=BODY)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "loading"
    assert int(answer.headers["retry-after"]) >= 1
    loading.go.set()
    monkeypatch.undo()
    assert loading.http().post("/v1/completions", json=BODY).status_code == 200


def test_stopped_before_it_is_loaded(slow):
    loading = slow()
    loading.server.handle_exit(signal.SIGTERM, None)
    loading.thread.join(10)
    assert not loading.thread.is_alive()  # nobody waits for the model
    assert loading.server.failure is None


def test_a_model_that_cannot_be_loaded_stops_the_server(slow):
    loading = slow(UserError("no such model"))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(loading.http().post, "/v1/completions", json=BODY)
        time.sleep(0.2)
        loading.go.set()
        assert answer.result().status_code == 503
    loading.thread.join(10)
    assert not loading.thread.is_alive()
    assert str(loading.server.failure) == "no such model"
