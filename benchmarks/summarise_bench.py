"""Speed on GPUs as the tables that docs/results.md and docs/parallel.md hold, from the records.

python benchmarks/summarise_bench.py            two tables of docs/results.md, then the one of docs/parallel.md
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
WANTED = {("mlp", 1024, "forward"): 1.60, ("mlp", 1024, "forward + backward"): 1.80, ("mlp", 512, "forward"): 1.75}
WANTED_PREFILL = {8192: 3, 32768: 2, 131072: 1}
RUNS = {
    "one-rows": "short rows, one GPU",
    "fsdp-rows": "short rows, FSDP2 on two",
    "one-long": "one row of 65,536 tokens, one GPU",
    "cp-long": "the same, context parallel on two, gathered keys and values",
    "cp-torch-long": "the same, PyTorch's own attention for slices",
}


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def mlp() -> str:
    rows = []
    for name in ("mlp", "mlp-128k"):
        record = load(f"bench/{name}")
        for r in record["results"]:
            over, peaks = r["over_no_ttt"], r["peak_bytes"]
            wanted = WANTED.get((name, r["chunk_size"], r["pass"]))
            memory = [f"{peaks[way] / peaks['no TTT']:.2f}" for way in ("ours", "materialised")]
            cells = [f"{record['shape']['tokens']:,}", str(r["chunk_size"]), r["pass"], f"{over['ours']:.2f}"]
            cells += [f"{over['materialised']:.2f}", f"{r['limit']:.2f}", "" if wanted is None else f"{wanted:.2f}"]
            rows.append([*cells, ", ".join(memory)])
    head = ["tokens", "chunk", "pass", "ours", "materialised", "limit", "wanted"]
    return table([*head, "peak memory: ours, materialised"], rows)


def prefill() -> str:
    rows = []
    for r in load("bench/prefill")["results"]:
        over = [100 * (r[name] - 1) for name in ("over_no_ttt", "materialised_over_no_ttt", "limit_over_no_ttt")]
        more = (r["peak_bytes"]["ours"] - r["peak_bytes"]["no TTT"]) / 2**30
        cells = [f"{r['tokens']:,}", *(f"{x:+.1f}%" for x in over), f"+{WANTED_PREFILL[r['tokens']]}%"]
        rows.append([*cells, f"{more:.2f} GiB"])
    return table(["tokens", "ours", "materialised", "limit", "wanted", "more memory at the peak"], rows)


def distributed() -> str:
    rows = []
    for run, name in RUNS.items():
        r = load(f"distributed/{run}")
        cells = [name, f"{r['tokens_per_second']:,.0f}", "", "", f"{r['peak_bytes'] / 2**30:.1f}", "", ""]
        if "efficiency" in r:
            cells[2:4] = f"{r['speedup']:.2f}", f"{r['efficiency']:.0%}"
            cells[6] = f"{r['largest_loss_difference']:.1e}".replace("e-0", "e-")
        if r["exchange_bytes_per_step"]:
            cells[5] = f"{r['exchange_share']:.2%} of the time, {r['exchange_bytes_per_step'] / 2**20:.0f} MiB a step"
        rows.append(cells)
    head = ["run", "tokens/s", "over one GPU", "of twice one GPU", "peak GiB", "scan's exchange", "loss difference"]
    return table(head, rows)


if __name__ == "__main__":
    print("\n\n".join([mlp(), prefill(), distributed()]))
