"""Three tasks of lm-evaluation-harness on a local file: multiple choice, free generation, and whole texts."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

WORDS = ["the", "whale", "ship", "sea", "captain", "white", "great", "men", "boat", "water", "old", "under", "night"]
NAMES = ["local_choice", "local_generate", "local_rolling"]
_KINDS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def text(n: int, seed: int) -> str:
    drawn = torch.randint(len(WORDS), (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn)


TEXTS = [text(n, n) for n in (21, 5, 33, 9, 14)]


def write(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """The task files and their data into a directory; returns it."""
    documents = [
        {"text": t, "choices": [" whale", " of the sea", " captain and men"], "answer": i % 3, "target": "whale"}
        for i, t in enumerate(texts)
    ]
    (path / "data.json").write_text("\n".join(json.dumps(d) for d in documents))
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path / "data.json"}}}
  cache_dir: {path / "cache"}
test_split: test
metadata: {{version: 1}}
"""
    for name, body in _KINDS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}{body}{common}")
    return path
