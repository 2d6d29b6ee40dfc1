"""Many clients on one server for some minutes: right answers, times to the first token and between tokens, memory.

    python benchmarks/serve_load.py --out benchmarks/results/serve/load.json

Starts ``inplace-ttt serve`` with the shipped model on the loopback and less memory than the sessions need, so that idle
ones go to disk and come back. Each client has a session: it reads pieces of Python's standard library and lets the
session write, greedily, streamed; now and then it asks without a session, forks, saves or looks. Others send garbage
all the while. At the end the sessions' answers are compared with those of ``Session`` alone.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import torch
from rich.console import Console
from transformers import AutoTokenizer

import inplace_ttt as ittt
from inplace_ttt.plots import ON, add_title, save, styled
from inplace_ttt.records import git_commit, hardware, versions, write_json

PLAIN = ("import os\n\ndef ", "class Reader:\n", "Call me Ishmael.")
GARBAGE = (b"", b"{", b"[" * 5000, b'{"model": 1}', b'{"prompt": "\\ud800", "model": "x"}', b"\x00\xff" * 500)
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/sessions/nobody/read", "/v1/sessions/../../x", "/v1/files")


class Client:
    """One client and what it did to its session, in order."""

    def __init__(self, url: str, name: str, model: str, seed: int) -> None:
        self.http = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self.model, self.rng, self.id = model, random.Random(seed), name
        self.done: list[tuple[str, Any]] = []
        self.first: list[float] = []
        self.between: list[float] = []
        self.answers: list[tuple[str, str]] = []
        """Prompts without a session, and what came."""
        self.wrong: list[str] = []
        self.busy = 0
        self.text = Path(argparse.__file__).read_text()

    def run(self, until: float) -> "Client":
        """Until the time is over. Every unexpected status is noted as wrong."""
        self.post("/v1/sessions", {"id": self.id})
        while time.monotonic() < until:
            kind = self.rng.choice(("read", "write", "write", "plain", "look", "fork", "save"))
            getattr(self, kind)()
        return self

    def post(self, path: str, body: Any, **options: Any) -> Any:
        for _ in range(200):
            answer = self.http.post(path, json=body, **options)
            if answer.status_code != 429:
                break
            self.busy += 1
            time.sleep(float(answer.headers["retry-after"]))
        if answer.status_code not in (200, 201):
            self.wrong.append(f"{path}: {answer.status_code} {answer.text[:200]}")
        return answer

    def read(self) -> None:
        at = self.rng.randrange(len(self.text) - 3000)
        text = self.text[at : at + self.rng.randrange(100, 3000)]
        if self.post(f"/v1/sessions/{self.id}/read", {"text": text}).status_code == 200:
            self.done.append(("read", text))

    def write(self) -> None:
        prompt, most = self.rng.choice(("def ", "\n\n", "self.", "return ")), self.rng.randrange(4, 32)
        body = {"model": self.model, "prompt": prompt, "max_tokens": most, "temperature": 0, "stream": True}
        began, last, text = time.perf_counter(), 0.0, ""
        headers = {"x-session-id": self.id}
        with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code == 429:
                self.busy += 1
                return
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    self.wrong.append(str(event))
                    return
                now = time.perf_counter()
                (self.between if last else self.first).append(now - (last or began))
                last = now
                text += event["choices"][0]["text"]
        self.done.append(("write", (prompt, most, text)))

    def plain(self) -> None:
        prompt = self.rng.choice(PLAIN)
        body = {"model": self.model, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        answer = self.post("/v1/completions", body)
        if answer.status_code == 200:
            self.answers.append((prompt, answer.json()["choices"][0]["text"]))

    def look(self) -> None:
        self.post(f"/v1/sessions/{self.id}/score", {"text": "import os"})

    def fork(self) -> None:
        new = self.post(f"/v1/sessions/{self.id}/fork", {})
        if new.status_code == 201:
            self.http.delete(f"/v1/sessions/{new.json()['id']}")

    def save(self) -> None:
        self.post(f"/v1/sessions/{self.id}/save", {})


def bother(url: str, until: float, seed: int) -> tuple[int, list[str]]:
    """Sends garbage; how often, and the answers that were not 4xx."""
    http, rng, count, wrong = httpx.Client(base_url=url, timeout=60, trust_env=False), random.Random(seed), 0, []
    while time.monotonic() < until:
        data, path = rng.choice((*GARBAGE, rng.randbytes(2000))), rng.choice(ROUTES)
        kind = rng.choice(("application/json", "multipart/form-data; boundary=b", "text/plain"))
        answer = http.post(path, content=data, headers={"content-type": kind})
        count += 1
        if not 400 <= answer.status_code < 500:
            wrong.append(f"{path} {data[:40]!r}: {answer.status_code}")
        time.sleep(0.05)
    return count, wrong


def resident(process: int) -> int | None:
    """Bytes of memory that a process holds."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found.group(1)) * 1024 if found else None


def load(url: str, clients: int, seconds: float, process: int) -> tuple[list[Client], dict[str, Any]]:
    """Runs all clients against a server; they, and what was seen."""
    with httpx.Client(base_url=url, trust_env=False) as http:
        model = http.get("/v1/models").json()["data"][0]["id"]
    until, memory = time.monotonic() + seconds, []
    prefix = f"load-{os.getpid()}-{int(time.time())}"
    everybody = [Client(url, f"{prefix}-{n}", model, n) for n in range(clients)]

    def watch() -> None:
        while time.monotonic() < until:
            memory.append(resident(process))
            time.sleep(max(0.2, seconds / 60))

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(clients + 2) as pool:
        bothering = [pool.submit(bother, url, until, n) for n in range(2)]
        everybody = list(pool.map(lambda client: client.run(until), everybody))
        garbage = [job.result() for job in bothering]
    watching.join()
    with httpx.Client(base_url=url, trust_env=False) as http:
        there = {session["id"] for session in http.get("/v1/sessions").json()["data"]}
        numbers = http.get("/metrics").text
    wrong = [text for client in everybody for text in client.wrong] + [text for _, found in garbage for text in found]
    first, between = ([x for c in everybody for x in getattr(c, name)] for name in ("first", "between"))
    return everybody, {
        "clients": clients, "seconds": seconds, "requests_done": sum(len(c.done) + len(c.answers) for c in everybody),
        "garbage_sent": sum(count for count, _ in garbage), "wrong_status": wrong[:20],
        "lost_sessions": [c.id for c in everybody if c.id not in there], "told_to_wait": sum(c.busy for c in everybody),
        "first_token_seconds": quantiles(first), "between_tokens_seconds": quantiles(between),
        "tokens_written": len(between) + len(first), "resident_bytes": memory, "memory_growth": growth(memory),
        "metrics": {k: float(v) for k, v in re.findall(r"^(inplace_ttt_\w+) ([\d.e+-]+)$", numbers, re.M)},
    }  # fmt: skip


def growth(memory: Sequence[int | None]) -> float:
    """Memory of the last quarter of the time over that of the second one."""
    known, quarter = [x for x in memory if x], max(1, len(memory) // 4)
    return float(np.mean(known[-quarter:]) / np.mean(known[quarter : 2 * quarter] or known[:1]))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the 99th percentile."""
    return {name: float(np.quantile(values, q)) for name, q in (("p50", 0.5), ("p99", 0.99))} if values else {}


def check(clients: Sequence[Client], model: Any, tokenizer: Any) -> tuple[int, list[str]]:
    """Lets the library alone do what the clients' sessions did: how many answers were compared, and the wrong ones."""
    compared, wrong = 0, []
    expected = {p: ittt.Session(model, tokenizer).generate(p, max_new_tokens=12) for p in PLAIN}
    for client in clients:
        session = ittt.Session(model, tokenizer)
        for kind, what in client.done:
            if kind == "read":
                session.read(what)
                continue
            prompt, most, text = what
            compared += 1
            if (want := session.generate(prompt, max_new_tokens=most)) != text:
                wrong.append(f"{client.id}, after {session.stats().tokens} tokens: {text!r}, not {want!r}")
                break  # from here on it reads something else
        for prompt, text in client.answers:
            compared += 1
            if text != expected[prompt]:
                wrong.append(f"{client.id}, no session: {text!r}, not {expected[prompt]!r}")
    return compared, wrong


def start(state: str, memory: float) -> tuple[Any, str, dict[str, float]]:
    """The server's process and address, and seconds: until it listened, was loaded, answered the line it printed."""
    program = [sys.executable, "-m", "inplace_ttt", "serve", "--port", "0", "--state-dir", state, "--rate", "1000000"]
    began = time.monotonic()
    process = subprocess.Popen([*program, "--memory", str(memory)], stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    while not lines or not lines[-1].startswith("curl "):
        lines.append(process.stdout.readline())  # type: ignore[union-attr]
        assert lines[-1], "the server did not start"
    found = {"listening": time.monotonic() - began, "listening_cpu": processor_time(process.pid)}
    url = re.search(r"http://127.0.0.1:\d+", lines[0]).group()  # type: ignore[union-attr]
    httpx.get(f"{url}/health", trust_env=False).raise_for_status()
    found["health"] = time.monotonic() - began
    said = subprocess.run(lines[-1], shell=True, check=True, capture_output=True).stdout
    assert json.loads(said)["usage"]["completion_tokens"] == 24
    found |= {"answered": time.monotonic() - began, "answered_cpu": processor_time(process.pid)}
    return process, url, found


def processor_time(process: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def draw(found: dict[str, Any], path: Path) -> None:
    """Memory over time."""
    figure, axes = styled(6.0, 2.6)
    axis, memory = axes[0, 0], found["resident_bytes"]
    axis.plot(np.linspace(0, found["seconds"], len(memory)), np.array(memory) / 2**20, color=ON, lw=1.6)
    axis.set_ylim(0)
    axis.set_xlabel("seconds")
    axis.set_ylabel("resident memory (MiB)")
    add_title(axis, f"{found['clients']} clients on one server")
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--memory", type=float, default=0.25, help="GiB for sessions")
    parser.add_argument("--check", type=int, default=32, help="clients whose answers are compared with the library's")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    console, started = Console(stderr=True), datetime.now(UTC)
    with tempfile.TemporaryDirectory() as state:
        process, url, startup = start(state, given.memory)
        console.print(f"{startup}; {given.clients} clients for {given.seconds:.0f} s")
        try:
            used = processor_time(process.pid)
            clients, found = load(url, given.clients, given.seconds, process.pid)
            found["cpu_seconds"] = processor_time(process.pid) - used
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(120)
    model = ittt.from_pretrained(ittt.DEFAULT_MODEL, dtype=torch.float32).eval()
    compared, wrong = check(clients[: given.check], model, AutoTokenizer.from_pretrained(ittt.DEFAULT_MODEL))
    record = {
        "what": "clients on one server", "date": started.isoformat(timespec="seconds"), "commit": git_commit(),
        "hardware": hardware(), "load_average": os.getloadavg(), "versions": versions(), "startup_seconds": startup,
        "memory_gib": given.memory, "exit_code": code, "answers_compared": compared, "wrong_answers": wrong, **found,
    }  # fmt: skip
    write_json(given.out, record)
    draw(record, given.out.with_suffix(".png"))
    left_out = ("resident_bytes", "metrics", "hardware", "versions")
    console.print({key: value for key, value in record.items() if key not in left_out})


if __name__ == "__main__":
    main()
