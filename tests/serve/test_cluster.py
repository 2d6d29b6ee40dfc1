"""Two replicas on a local Ray cluster, one of them killed under load."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
import torch
import yaml
from locations import ROOT
from session.models import TEXT, shipped, tokenizer

from inplace_ttt import Session
from inplace_ttt.errors import UserError
from inplace_ttt.serve.settings import Limits

ray = pytest.importorskip("ray", reason="needs pip install -e '.[serve-ray]'")
pytest.importorskip("ray.serve.experimental.consistent_hash_router", reason="needs a newer Ray")

PORT = 18_265


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    from ray import serve

    from inplace_ttt.serve.cluster import Arguments, application

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        limits = {"rate": 1_000_000, "memory": 1 << 28}
        arguments = Arguments(state_dir=str(tmp_path), replicas=2, probe_every=0, limits=limits)
        serve.run(application(arguments), name="sessions")
        fresh = httpx.Limits(
            max_keepalive_connections=0
        )  # the proxy closes what was idle, on a slow machine in between
        yield httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60, trust_env=False, limits=fresh)
        serve.shutdown()
    finally:
        ray.shutdown()


def replicas() -> set[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["name"].startswith("SERVE_REPLICA::sessions")}


def wait_until(is_so) -> None:
    until = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.1)


def ask(http: httpx.Client, method: str, path: str, **options) -> httpx.Response | None:
    """The answer, or None where the replica died or is being replaced."""
    try:
        answer = http.request(method, path, **options)
    except httpx.HTTPError:
        return None
    return None if answer.status_code >= 500 or answer.status_code == 408 else answer


class Reader:
    """A client that reads into its session, one journal entry at a time, and asks again when its replica dies."""

    def __init__(self, http: httpx.Client, number: int) -> None:
        self.http, self.id, self.version = http, f"s{number}", 0
        self.headers = {"x-session-id": self.id}
        self.session = Session(shipped(torch.float32), tokenizer(), probe_every=0)
        assert http.post("/v1/sessions", json={"id": self.id}, headers=self.headers).status_code == 201

    def read(self, text: str) -> None:
        self.session.read(text)
        body = {"text": text, "if_version": self.version}
        for _ in range(200):
            answer = self.ask("POST", f"/v1/sessions/{self.id}/read", json=body)
            if answer is not None and answer.status_code != 409:
                assert answer.status_code == 200, answer.text
                break
            found = self.ask("GET", f"/v1/sessions/{self.id}")
            if found is not None and found.json()["version"] > self.version:
                break  # it was noted before the replica died, which may ask another one by itself
            time.sleep(0.1)
        self.version += 1

    def ask(self, method: str, path: str, **options) -> httpx.Response | None:
        return ask(self.http, method, path, headers=self.headers, **options)

    def neighbours(self) -> frozenset[str]:
        """The sessions that the replica which its requests reach has in memory."""
        listed = self.http.get("/v1/sessions", headers=self.headers).json()["data"]
        return frozenset(each["id"] for each in listed if each["in_memory"])

    def write(self) -> tuple[str, str]:
        body = {"model": "books-and-code", "prompt": "\n    def ", "max_tokens": 12, "temperature": 0}
        got = self.ask("POST", "/v1/completions", json=body).json()["choices"][0]["text"]
        self.version += 2
        return got, self.session.generate("\n    def ", max_new_tokens=12)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_replica_is_replaced_and_loses_no_session(cluster):
    before, plain, killed, stop = replicas(), [], threading.Event(), threading.Event()
    assert len(before) == 2
    readers, groups = [], set()
    while len(groups) < 2 or min(map(len, groups)) < 2 or len(readers) < 6:  # either replica has sessions
        readers.append(Reader(cluster, len(readers)))
        readers[-1].read(TEXT[:200])
        groups = {reader.neighbours() for reader in readers}
    assert len(groups) == 2
    assert not frozenset.intersection(*groups)
    for reader in readers:
        assert all(reader.id in reader.neighbours() for _ in range(3))  # always the same replica

    def bother() -> None:
        """Plain requests; what is answered is right."""
        body = {"model": "books-and-code", "prompt": TEXT[:40], "max_tokens": 8, "temperature": 0}
        while not stop.is_set():
            answer = ask(cluster, "POST", "/v1/completions", json=body)
            if answer is not None:
                assert answer.status_code == 200, answer.text
                plain.append(answer.json()["choices"][0]["text"])

    def work(reader: Reader) -> None:
        left = 4
        while left:
            left -= killed.is_set()
            reader.read(TEXT[30 * left :][:200])

    with ThreadPoolExecutor(len(readers) + 2) as pool:
        jobs = [pool.submit(work, reader) for reader in readers]
        bothering = [pool.submit(bother) for _ in range(2)]
        try:
            time.sleep(0.5)
            victim = sorted(before)[0]
            ray.kill(ray.get_actor(victim, namespace="serve"), no_restart=True)
            wait_until(lambda: victim not in replicas())
            killed.set()
            for job in jobs:
                job.result()
        finally:  # nothing may wait for ever
            killed.set()
            stop.set()
        for job in bothering:
            job.result()
    for reader in readers:
        got, want = reader.write()
        assert got == want
        assert cluster.get(f"/v1/sessions/{reader.id}", headers=reader.headers).json()["version"] == reader.version
    assert plain
    assert set(plain) == {Session(shipped(torch.float32), tokenizer()).generate(TEXT[:40], max_new_tokens=8)}
    wait_until(lambda: len(replicas()) == 2)


def test_arguments_are_checked():
    from inplace_ttt.serve.cluster import Arguments, application

    with pytest.raises(UserError, match="'bach'"):
        application(Arguments(state_dir="/tmp", limits={"bach": 1}))
    with pytest.raises(ValueError, match="replica"):
        Arguments(state_dir="/tmp", replica=2)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (file,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Limits(**Arguments(**yaml.safe_load(file)["applications"][0]["args"]).limits)
