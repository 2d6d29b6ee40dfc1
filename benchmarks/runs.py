"""Many variants of one training side by side: a queue for every GPU, one record for every run.

    python benchmarks/runs.py benchmarks/smollm2.yaml --gpus 4 --out out/smollm2 [--only NAME ...] [--seconds S] \\
        [--set steps=20 seed=1] [--measure tokens=512]

The table names runs::

    imports: [peers]                 # modules that make models known, if any
    settings: {data.test: {}}        # of all runs, as `inplace-ttt train RECIPE key=value` takes them
    evaluation: {books: [FILE]}      # of all runs, see measure_trained.py
    runs:
      NAME: {recipe: recipes/smollm2-window.yaml, settings: {ttt.chunk_size: 512}, evaluation: {...}, seeds: [0, 1]}

The tokens are made first, once for all. A run is a process of its own; what it prints is in OUT/NAME/log.txt, its
record in OUT/NAME/run.json: settings, curve, tokens, speed, evaluation, commit, hardware, versions, date. A run that
fails or diverges leaves a record with ``failed``, the reason, and does not stop the others; a run with a record is not
run again (delete the record to repeat it). The longest of a seed begin first. ``--seconds``: after so many nothing
begins, and what is running is ended without a record; a run that would not fit, by the speed of those before it, does
not begin. ``--beside N``: so many runs share a GPU, one trained while another is evaluated, which leaves most of it
idle; speeds of such records compare with no others. ``--seeds``: runs of these alone. ``--scratch``: where models are
written, OUT unless given. ``--set``, ``--measure``: settings and settings of the evaluation for all runs, over the
table's. With ``seeds`` a run becomes NAME-seed0, NAME-seed1; ``--only NAME`` means all of them.
"""

import argparse
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from measure_trained import measure_trained
from rich.console import Console

from inplace_ttt.errors import UserError, in_one_line
from inplace_ttt.records import about, write_json
from inplace_ttt.train.plan import plan
from inplace_ttt.train.prepare import prepare
from inplace_ttt.train.recipe import load_recipe
from inplace_ttt.train.run import run as train
from inplace_ttt.train.schema import RecipeError, build, expand_variables, load_yaml
from inplace_ttt.train.specs import Recipe

EVERY = 20
"""Seconds between the lines about what is running."""
H200 = (989, 4.8)
LINE = re.compile(r"step +(\d+) +loss ([\d.]+|nan|inf)(?:.*?([\d,]+) tokens/s)?")


@dataclass(frozen=True)
class Run:
    """A row of the table: a recipe, settings that replace its own, and what is measured afterwards."""

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    name: str = ""

    def checked(self, scratch: Path) -> Recipe:
        """The recipe of this run. RecipeError where it is wrong."""
        plain = "ttt" in self.settings and self.settings["ttt"] is None  # and stays so, whatever --set says of ttt
        given = {key: value for key, value in self.settings.items() if not (plain and key.startswith("ttt."))}
        named = {**given, "name": self.name, "output": str(scratch / self.name / "train")}
        return load_recipe(self.recipe, [f"{key}={json.dumps(value)}" for key, value in named.items()])


@dataclass(frozen=True)
class Table:
    """The file: what all runs share, and the runs by name."""

    runs: dict[str, Run]
    imports: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)


def read_table(path: Path, settings: Sequence[str] = (), evaluation: Sequence[str] = ()) -> list[Run]:
    """The runs of a table, each with what all share, and key=value over both. RecipeError where it is wrong."""
    over = [dict(map(key_and_value, texts)) for texts in (settings, evaluation)]
    try:
        table = build(Table, load_yaml(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    for module in table.imports:
        importlib.import_module(module)
    found = []
    for name, run in table.runs.items():
        shared, evaluation = table.settings | run.settings, table.evaluation | run.evaluation | over[1]
        seeds = run.seeds or table.seeds
        for settings, label in [({"seed": n}, f"{name}-seed{n}") for n in seeds] or [({}, name)]:
            found.append(Run(run.recipe, shared | settings | over[0], evaluation, name=label))
    return found


def key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{text!r}: write key=value")
    return key, load_yaml(value)


def progress(log: Path) -> list[dict[str, float]]:
    """The curve that a log tells: steps, losses, tokens per second where a line has them."""
    found = LINE.findall(log.read_text(encoding="utf-8", errors="ignore")) if log.exists() else []
    return [
        {"step": int(step), "loss": float(loss)} | ({"tokens_per_second": float(rate.replace(",", ""))} if rate else {})
        for step, loss, rate in found
    ]


# -- one run, in a process of its own ----------------------------------------------------------------------------------


def do(run: Run, out: Path, scratch: Path, beside: int = 1) -> bool:
    """Train, measure, write the record; whether it went well. ``beside``: runs that share its GPU, this one counted."""
    started, where = datetime.now(UTC), scratch / run.name / "train"
    record: dict[str, Any] = {"name": run.name, "recipe": run.recipe, "settings": run.settings, "failed": None}
    record["beside"] = beside
    shutil.rmtree(where, ignore_errors=True)  # of one that was ended
    try:
        recipe = run.checked(scratch)
        record["recipe_as_run"] = {key: value for key, value in recipe.raw.items() if key != "output"}
        with alone_in_training(scratch):
            train(recipe, console=Console(width=200))
        trained = json.loads((where / "run.json").read_text(encoding="utf-8"))
        kept = ("tokens_per_second", "mfu", "peak_memory_bytes", "parameters", "trained_parameters", "tokens_seen")
        record |= {name: trained[name] for name in (*kept, "data", "warnings", "curve")}
        record |= {"seconds_of_training": trained["seconds"]}
        lost = [entry for entry in record["curve"] if not math.isfinite(entry.get("grad_norm", 0.0))]
        if 2 * len(lost) > (logged := sum("loss" in entry for entry in record["curve"])):
            reason = "the gradient was not finite in"
            raise UserError(f"{reason} {len(lost)} of {logged} logged steps: such steps change nothing")
        begin = time.perf_counter()
        record["evaluation"] = measure_trained(where / "model", expand_variables(run.evaluation, "evaluation"), print)
        record["evaluation"]["settings"] = run.evaluation  # as written: no machine's paths
        record["seconds_of_evaluation"] = round(time.perf_counter() - begin, 1)
    except Exception as error:  # whatever it is, the record says so
        traceback.print_exc()
        record["failed"] = str(error) if isinstance(error, UserError) else in_one_line(error)
        record.setdefault("curve", progress(out / run.name / "log.txt"))
    plain = json.loads(
        json.dumps(record | about(started), default=str), parse_constant=lambda _: None
    )  # nan is not JSON
    write_json(out / run.name / "run.json", plain)
    return record["failed"] is None


@contextmanager
def alone_in_training(scratch: Path) -> Iterator[None]:
    """Wait until no other run trains on this one's GPU."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.is_available() else "cpu"
    scratch.mkdir(parents=True, exist_ok=True)
    with FileLock(scratch / f"training-on-{gpu}.lock"):
        yield


# -- the queue ---------------------------------------------------------------------------------------------------------


def cost(recipe: Recipe, known: dict[str, float]) -> float:
    """Seconds that a run takes by its plan, on an H200. ``known``: seconds per token of recipes that differ little."""
    alike = str((recipe.model, recipe.trainable, recipe.sequence_length, recipe.ttt and recipe.ttt.get("layers")))
    if alike not in known:
        known[alike] = plan(recipe).seconds_per_token(*H200)
    return recipe.steps * recipe.tokens_per_step * known[alike]


class Queue:
    """Runs that wait, and processes that run, one for each slot."""

    def __init__(self, waiting: Sequence[tuple[Run, float]], given: argparse.Namespace, slots: int) -> None:
        self.waiting = sorted(waiting, key=lambda pair: (pair[0].settings.get("seed", 0), -pair[1]))
        self.given = given
        self.running: dict[int, tuple[Run, float, float, subprocess.Popen[bytes]]] = {}
        self.slots, self.begin = slots, time.perf_counter()
        self.slower = 0.0  # measured seconds over planned ones, the worst so far
        self.failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return float(self.given.seconds) - (time.perf_counter() - self.begin)

    def work(self) -> None:
        """Until nothing waits or runs, or the time is over."""
        told = time.perf_counter()
        try:
            while self.left > 0 and (self.fill() or self.running):
                time.sleep(min(0.2, max(self.left, 0)))
                self.reap()
                if time.perf_counter() - told > EVERY:
                    told = time.perf_counter()
                    self.tell()
        finally:
            for run, _, _, process in self.running.values():
                process.terminate()
                print(f"{run.name}: ended before it was done, no record", flush=True)
            for *_, process in self.running.values():
                process.wait()
            if self.waiting:
                print("not begun:", " ".join(run.name for run, _ in self.waiting), flush=True)

    def fill(self) -> bool:
        """Begin what fits in free slots; whether anything began."""
        began = False
        for slot in range(self.slots):
            fitting = [i for i, (_, planned) in enumerate(self.waiting) if planned * self.slower < self.left]
            if slot not in self.running and fitting:
                self.start(slot, *self.waiting.pop(fitting[0]))
                began = True
        return began

    def start(self, slot: int, run: Run, planned: float) -> None:
        folder = self.given.out / run.name
        folder.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.slots))
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        number = slot % (self.slots // self.given.beside)
        gpu = named[number] if named[0] else str(number)
        there = {"CUDA_VISIBLE_DEVICES": gpu} if torch.cuda.is_available() else {}
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **there, "PYTHONUNBUFFERED": "1"}
        with open(folder / "log.txt", "wb") as log:
            process = subprocess.Popen(self.command(run), env=environment, stdout=log, stderr=subprocess.STDOUT)
        self.running[slot] = run, planned, time.perf_counter(), process
        print(f"{run.name}: begins in slot {slot}", flush=True)

    def command(self, run: Run) -> list[str]:
        """This program, for one run."""
        given = self.given
        files = [str(given.table), "--out", str(given.out), "--scratch", str(given.scratch)]
        over = [f"--{name}={text}" for name in ("set", "measure") for text in getattr(given, name)]
        return [sys.executable, __file__, *files, "--beside", str(given.beside), "--one", run.name, *over]

    def reap(self) -> None:
        """Take note of what has ended."""
        for slot, (run, planned, started, process) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[slot]
            path, seconds = self.given.out / run.name / "run.json", time.perf_counter() - started
            if not path.exists():  # it was killed, for memory say
                record = {"name": run.name, "recipe": run.recipe, "settings": run.settings}
                record |= {"failed": f"ended with status {process.returncode}"}
                write_json(path, record | {"curve": progress(path.with_name("log.txt"))} | about())
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["failed"] is None:
                self.slower = max(self.slower, seconds / planned)
            else:
                self.failed.append(run.name)
            said = record["failed"] or ", ".join(short(record))
            print(f"{run.name}: {'FAILED: ' if record['failed'] else ''}{said}, {seconds:.0f} s", flush=True)

    def tell(self) -> None:
        """A line for everything that runs."""
        for run, _, started, _ in self.running.values():
            curve = progress(self.given.out / run.name / "log.txt")
            last = curve[-1] if curve else {}
            parts = ["step {step}".format(**last), "loss {loss:.4f}".format(**last)] if last else ["begins"]
            parts += ["{tokens_per_second:,.0f} tokens/s".format(**last)] if "tokens_per_second" in last else []
            print(f"{run.name}: {', '.join(parts)}, {time.perf_counter() - started:.0f} s", flush=True)


def short(record: Mapping[str, Any]) -> list[str]:
    """Losses of a record, for a line."""
    found = []
    for domain, row in record["evaluation"]["losses"].items():
        found.append(f"{domain} {row['on']:.4f}" + (f" (off {row['off']:.4f})" if "off" in row else ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=None, help="left out: all there are; on a CPU one run at a time")
    parser.add_argument("--beside", type=int, default=1, help="runs on one GPU at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="SEED")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--measure", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.scratch = given.scratch or given.out
    runs = read_table(given.table, given.set, given.measure)
    known = [run.name for run in runs]
    family = {name: re.sub(r"-seed\d+$", "", name) for name in known}
    if unknown := sorted({*given.only, *([given.one] if given.one else [])} - {*known, *family.values()}):
        raise UserError(f"--only {unknown[0]}: {given.table} has no such run, only {', '.join(known)}")
    if given.one:
        sys.exit(not do(runs[known.index(given.one)], given.out, given.scratch, given.beside))
    there_are = torch.cuda.device_count()
    if given.beside < 1:
        raise UserError(f"--beside {given.beside}: must be 1 or more")
    if there_are and given.gpus is not None and not 1 <= given.gpus <= there_are:
        raise UserError(f"--gpus {given.gpus}: this machine has {there_are}")
    runs = [run for run in runs if not given.only or {run.name, family[run.name]} & set(given.only)]
    runs = [run for run in runs if not given.seeds or run.settings.get("seed") in given.seeds]
    there = [run.name for run in runs if (given.out / run.name / "run.json").exists()]
    if there:
        print("have a record:", " ".join(there), flush=True)
    waiting, speeds = [], dict[str, float]()
    for run in runs:
        if run.name not in there:
            recipe = run.checked(given.scratch)  # a mistake in any of them ends it before anything is trained
            prepare(recipe, lambda line: None if line.startswith("tokens: ") else print(line, flush=True))
            waiting.append((run, cost(recipe, speeds)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and so do the runs
    queue = Queue(waiting, given, given.beside * ((given.gpus or there_are) if there_are else 1))
    queue.work()
    sys.exit(f"failed: {', '.join(queue.failed)}" if queue.failed else 0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
