"""RULER's texts of the six tasks that need no download, as JSON lines, for machines without lm-evaluation-harness.

    python benchmarks/ruler_texts.py --tokenizer out/smollm2-full --texts 8 out/ruler.jsonl

A line: ``task``, ``length`` (tokens of prompt and answer, at most), ``prompt``, ``outputs`` (the right answers) and
``tokens`` (to generate). ``score`` is RULER's: the share of the right answers that occur in what was generated. The
tasks cwe and vt have no texts below 2,048 tokens.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoTokenizer

from inplace_ttt.eval.harness_tasks import RULER_OFFLINE, SHORTEST_RULER, require
from inplace_ttt.eval.ruler import RulerData, config

LENGTHS = (1024, 2048, 4096, 8192)
LONG_ONLY = ("ruler_cwe", "ruler_vt")


def texts_of(tokenizer: Any, lengths: Sequence[int], texts: int) -> Iterator[dict[str, Any]]:
    require()
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for task in RULER_OFFLINE:
            found: Any = config(task, RulerData(), texts)
            fitting = [n for n in lengths if task not in LONG_ONLY or n >= SHORTEST_RULER]
            for row in found["custom_dataset"](tokenizer=folder, max_seq_lengths=fitting)["test"]:
                yield {
                    "task": task, "length": row["max_length"], "prompt": f"{row['input']} {row['gen_prefix']}",
                    "outputs": list(row["outputs"]), "tokens": found["generation_kwargs"]["max_gen_toks"],
                }  # fmt: skip


def score(text: str, outputs: Sequence[str]) -> float:
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--lengths", type=lambda x: [int(n) for n in x.split(",")], default=LENGTHS)
    parser.add_argument("--texts", type=int, default=8, help="of each task and length")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = list(texts_of(AutoTokenizer.from_pretrained(given.tokenizer), given.lengths, given.texts))
    given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.out}: {len(rows)} texts")


if __name__ == "__main__":
    main()
