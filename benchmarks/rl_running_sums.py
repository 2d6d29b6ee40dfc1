"""Baselines on running sums: noise of the gradient, the energy proxy against true norms, learning curves.

    python benchmarks/rl_running_sums.py                      # all GPUs of this machine
    python benchmarks/rl_running_sums.py --gpus 1 --steps 80 --plain-learning
    python benchmarks/rl_running_sums.py --device cpu --size tiny --out /tmp/rl   # does the script work?

A small Llama (3.2M parameters), plain and with fast weights, learns running sums ("3+8+5=" -> "3,11,16;16$") from
worked answers and is saved at about 10, 40 and 80 % success. From there:

* noise: the covariance of a group's gradient, its expectation and its shrinkage, for every baseline on the same
  completions of 256 prompts, in groups of 4, 8 and 32;
* proxy: rank correlation of w and W with the squared norms of the true gradients, token by token;
* tune: the learning rate that suits leave-one-out means best, out of four;
* learning: reinforcement from the middle level in groups of 4 and 32, three seeds, every baseline at that rate, and
  leave-one-out means at the rate times the shrinkage that was measured for the Optimal Token Baseline.

Parts are jobs, each a process on one GPU. Writes one record per part and pictures to ``benchmarks/results/rl``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rl_parts
import torch
from plot_rl import draw
from rich.console import Console
from rl_parts import ATTACHED_VARIANTS, MIDDLE, RATES, VARIANTS, checkpoint, job_name
from rl_policy import KINDS, SIZES, TTT

from inplace_ttt.records import about, write_json

OUT = Path(__file__).parent / "results" / "rl"
PARTS = ("supervised", "tune", "noise", "proxy", "learning")
Job = tuple[str, tuple[Any, ...], list[str]]
"""A part, its arguments after the device, and the files in the work folder that it needs."""


def make_jobs(size_name: str, parts: list[str], steps: int | None, plain_learning: bool) -> list[Job]:
    """Return all jobs, those first that others wait for."""
    size = SIZES[size_name]
    jobs: list[Job] = [("supervised", (kind,), []) for kind in KINDS]
    middle = {kind: checkpoint(Path(), kind, size.levels[MIDDLE]).name for kind in KINDS}
    jobs += [("tune", (kind, lr), [middle[kind]]) for kind in KINDS[: 1 if plain_learning else None] for lr in RATES]
    for level in sorted(size.levels, key=lambda x: x != size.levels[MIDDLE]):
        jobs += [("noise", (kind, level), [checkpoint(Path(), kind, level).name]) for kind in KINDS]
    for n in (min(size.sizes), max(size.sizes)):
        for kind, variants in (("attached", ATTACHED_VARIANTS), ("plain", tuple(VARIANTS))):  # the longest first
            if kind == "attached" and plain_learning:
                continue
            needs = [middle[kind], *(f"{job_name('tune', kind, lr)}.json" for lr in RATES)]
            for variant in variants:
                also = [f"{job_name('noise', kind, size.levels[MIDDLE])}.json"] if "scaled" in VARIANTS[variant] else []
                jobs.append(("learning", (kind, variant, n, steps or size.learning[0]), [*needs, *also]))
    for level in size.levels:
        jobs += [("proxy", (kind, level), [checkpoint(Path(), kind, level).name]) for kind in KINDS]
    return [job for job in jobs if job[0] in parts]


def run_job(work: Path, size_name: str, device: str, part: str, words: list[Any]) -> None:
    """Do one job in this process; its output appears whole or not at all."""
    torch.set_float32_matmul_precision("high")
    started = time.monotonic()
    found = getattr(rl_parts, part)(work, SIZES[size_name], device, *words)
    names = ("kind", "variant", "n", "steps") if part == "learning" else ("kind", "lr" if part == "tune" else "level")
    about = dict(zip(names, words, strict=False))
    path = work / f"{job_name(part, *words)}.json"
    path.with_suffix(".part").write_text(json.dumps(about | found | {"seconds": round(time.monotonic() - started, 1)}))
    path.with_suffix(".part").rename(path)


def run_all(jobs: list[Job], work: Path, size: str, device: str, gpus: int, per_gpu: int, limit: float) -> list[str]:
    """Run jobs as processes, ``per_gpu`` at a time on each GPU. Return what failed or was not done in ``limit`` s."""
    console, started = Console(stderr=True), time.monotonic()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device == "cuda" else []
    cards = [c for c in visible if c] or [str(i) for i in range(gpus)]
    to_do = [job for job in jobs if not (work / f"{job_name(job[0], *job[1])}.json").exists()]
    waiting, running, missing = to_do, list[tuple[subprocess.Popen[bytes], Job, str, float]](), list[str]()

    def name(job: Job) -> str:
        return job_name(job[0], *job[1])

    def say(line: str) -> None:
        console.print(f"{time.monotonic() - started:5.0f} s  {line}", highlight=False)

    while waiting or running:
        late = time.monotonic() - started > limit
        for entry in list(running):
            process, job, card, begun = entry
            if late and process.poll() is None:
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            running.remove(entry)
            if process.returncode:
                tail = (work / f"{name(job)}.log").read_text(errors="replace")[-600:]
                missing.append(name(job))
                say(f"[red]{name(job)}: {'out of time' if late else 'failed'}[/red]" + ("" if late else f"\n{tail}"))
            else:
                say(f"{name(job)}  ({time.monotonic() - begun:.0f} s on {card})")
        made = {path.name for path in work.iterdir()}
        ready = [job for job in waiting if made.issuperset(job[2])]
        if late or (waiting and not ready and not running):
            missing += [name(job) for job in waiting]
            waiting = []
        for job in ready if not late else []:
            loads = {card: sum(c == card for _, _, c, _ in running) for card in cards[:gpus]}
            card = min(loads, key=lambda c: loads[c])
            if loads[card] >= per_gpu:
                break
            words = json.dumps(job[1])
            command = [sys.executable, __file__, "--job", job[0], words, "--work", str(work), "--size", size]
            environment = os.environ | {
                "CUDA_VISIBLE_DEVICES": card if device == "cuda" else "",
                "OMP_NUM_THREADS": "1",
            }
            with (work / f"{name(job)}.log").open("wb") as log:
                process = subprocess.Popen([*command, "--device", device], env=environment, stdout=log, stderr=log)
            running.append((process, job, card, time.monotonic()))
            waiting.remove(job)
        time.sleep(0.2)
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--gpus", type=int, help="left out: all that are visible")
    parser.add_argument("--per-gpu", type=int, default=5, help="processes at a time on one GPU; they wait for launches")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, help="of each learning curve; left out: those of the size")
    parser.add_argument("--plain-learning", action="store_true", help="no learning curves of the attached model")
    parser.add_argument("--minutes", type=float, default=9, help="what is not done by then is left out, and named")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, help="keeps policies and outputs of jobs: what is there is not done again")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        part, words = arguments.job
        run_job(arguments.work, arguments.size, arguments.device, part, json.loads(words))
        return
    gpus = arguments.gpus or (torch.cuda.device_count() if arguments.device == "cuda" else 1)
    if gpus < 1:
        parser.error("found no GPU (--device cpu --size tiny tries the script without)")
    started, begun = time.monotonic(), datetime.now(UTC)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        jobs = make_jobs(arguments.size, arguments.parts, arguments.steps, arguments.plain_learning)
        missing = run_all(jobs, work, arguments.size, arguments.device, gpus, arguments.per_gpu, 60 * arguments.minutes)
        origin = {
            "command": " ".join(["rl_running_sums.py", *sys.argv[1:]]),
            **about(begun),
            "size": vars(SIZES[arguments.size]),
            "ttt": TTT,
        }
        for part in arguments.parts:
            outputs = [work / f"{job_name(p, *words)}.json" for p, words, _ in jobs if p == part]
            found = [json.loads(path.read_text()) for path in outputs if path.exists()]
            left_out = [name for name in missing if name.startswith(f"{part}-")]
            write_json(arguments.out / f"{part}.json", origin | {"part": part, "missing": left_out, "jobs": found})
    draw(arguments.out, arguments.out)
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs in {time.monotonic() - started:.0f} s: {arguments.out}")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
