"""A GGUF file as a directory that transformers, and so a recipe's ``model.base``, loads: weights in float32.

    python benchmarks/dequantise.py SmolLM2-135M-Instruct.Q4_1.gguf out/smollm2-full
    python benchmarks/dequantise.py out/smollm2-full out/smollm2-window --window 512

``--window``: a Llama becomes a Mistral, which is the same but for its sliding window.
"""

import argparse
from pathlib import Path

import inplace_ttt as ittt
from inplace_ttt.hf.load import load


def dequantise(source: Path, out: Path, window: int | None = None) -> None:
    model, tokenizer = load(source, "cpu", objective="loss", window=window)
    ittt.detach(model)
    values = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = type(model)(type(model.config).from_dict(values))  # transformers does not save what came out of a GGUF file
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a GGUF file, or a directory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--window", type=int, default=None)
    given = parser.parse_args()
    dequantise(given.source, given.out, given.window)
    print(given.out)
