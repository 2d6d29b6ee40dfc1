"""Predicted against measured: peak memory and step time of a few training steps on one GPU.

python benchmarks/plan_check.py --text jsonl:corpus.jsonl [--tiny] [--tflops 989]

Writes benchmarks/results/plan/NAME.json. Peak memory is measured on CUDA only; elsewhere it says null. --tiny runs a
small shape, for trying the script without a GPU.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from inplace_ttt.records import write_json
from inplace_ttt.train.plan import plan
from inplace_ttt.train.recipe import make_recipe
from inplace_ttt.train.run import run

RESULTS = Path(__file__).parent / "results" / "plan"
QWEN3_06B = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
TINY = QWEN3_06B | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def check(length: int, checkpointing: bool, text: str, tokenizer: str, tiny: bool, tflops: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(
            {
                "name": "plan-check", "output": f"{folder}/run", "model": {"config": TINY if tiny else QWEN3_06B},
                "tokenizer": tokenizer, "data": {"train": {"text": text}, "cache": f"{folder}/tokens"},
                "ttt": {"layers": "0::1" if tiny else "0::6", "chunk_size": 16 if tiny else 1024},
                "optimizer": {"lr": 1e-4}, "sequence_length": length, "steps": 6, "log_every": 1,
                "precision": "bf16", "activation_checkpointing": checkpointing,
            }
        )  # fmt: skip
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        predicted = plan(recipe)
        record = json.loads((run(recipe, console=Console(quiet=True)) / "run.json").read_text())
    measured = record["peak_memory_bytes"] if torch.cuda.is_available() else None
    kept = {name: value for name, value in recipe.raw.items() if name not in ("data", "output")}
    rate = predicted.flops_per_token * record["tokens_per_second"]
    return {
        "recipe": kept | {"output": "out/plan-check"},
        "sequence_length": length,
        "activation_checkpointing": checkpointing,
        "predicted_bytes": predicted.total,
        "predicted_parts": predicted.memory,
        "measured_bytes": measured,
        "ratio": measured and predicted.total / measured,
        "tokens_per_second": record["tokens_per_second"],
        "flops_per_token": predicted.flops_per_token,
        "mfu": rate / (tflops * 1e12),
        **{name: record[name] for name in ("commit", "date", "hardware", "versions")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokenizer", default="src/inplace_ttt/models/books-and-code")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--tflops", type=float, default=989)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    points = ((128, False), (128, True)) if given.tiny else ((8192, False), (8192, True), (32768, True))
    for length, checkpointing in points:
        result = check(length, checkpointing, given.text, given.tokenizer, given.tiny, given.tflops)
        name = f"{'tiny' if given.tiny else 'qwen3-0.6b'}-{length}{'-checkpointing' if checkpointing else ''}"
        write_json(given.out / f"{name}.json", result)
        seen = f"{result['measured_bytes'] / 2**30:.2f} GiB" if result["measured_bytes"] else "not measured (no CUDA)"
        print(
            f"{name}: predicted {result['predicted_bytes'] / 2**30:.2f} GiB, measured {seen}; "
            f"{result['tokens_per_second']:,.0f} tokens/s, MFU {result['mfu']:.1%}"
        )


if __name__ == "__main__":
    main()
