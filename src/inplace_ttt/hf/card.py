"""The model card (``README.md``) of a saved directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

MARK = "<!-- Written by inplace-ttt. Remove this line and your own text is kept when the model is saved again. -->"


def write_card(
    directory: Path,
    settings: Mapping[str, Any],
    repo_id: str | None = None,
    results: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write ``README.md`` from the content of ``inplace_ttt.json``, unless one without ``MARK`` exists."""
    path = directory / "README.md"
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        path.write_text(card(repo_id or directory.resolve().name, settings, results), encoding="utf-8")


def card(name: str, settings: Mapping[str, Any], results: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Return the text: base, settings, code to load it, and results in nats per token where there are any."""
    base, is_adapter = settings["base"], settings["kind"] == "adapter"
    origin = base.get("name") or ""
    on_hub = origin.count("/") == 1 and not origin.startswith((".", "/", "~"))
    about: dict[str, Any] = {"library_name": "inplace-ttt", "tags": ["test-time-training", "fast-weights"]}
    if str(base.get("architecture", "ForCausalLM")).endswith(("ForCausalLM", "LMHeadModel")):
        about["pipeline_tag"] = "text-generation"
    if on_hub:
        about["base_model"] = origin
    revision = f", revision `{base['revision']}`" if base.get("revision") else ""
    what = (
        f"an adapter for `{origin or base['model_type']}`{revision}"
        if is_adapter
        else f"a `{base['model_type']}` model"
    )
    load = f'model = inplace_ttt.from_pretrained("{name}")'
    if is_adapter and not origin:
        load = f'model = inplace_ttt.from_pretrained("{name}", model=base)  # base: the model that it was made for'
    lines = [
        "---",
        yaml.safe_dump(about, sort_keys=False).strip(),
        "---",
        MARK,
        f"# {name.rsplit('/', 1)[-1]}",
        "",
        f"This is {what} with fast weights: it learns from what it reads, by In-Place Test-Time Training "
        "([arXiv 2604.06169](https://arxiv.org/abs/2604.06169)).",
        "",
        "```python",
        "import inplace_ttt",
        "",
        load,
        "```",
        "",
        "transformers alone refuses this directory, because it would leave the fast weights out. Once `inplace_ttt` is "
        "imported, `AutoModelForCausalLM.from_pretrained` loads it whole.",
        "",
        "| setting | value |",
        "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in settings["inplace_ttt"].items() if key != "format_version"),
    ]
    if results:
        lines += ["", "| loss, nats per token | updates on | updates off |", "| --- | --- | --- |"]
        lines += [f"| {text} | {_loss(found, 'on')} | {_loss(found, 'off')} |" for text, found in results.items()]
    return "\n".join([*lines, ""])


def _loss(found: Mapping[str, float], name: str) -> str:
    return f"{found[name]:.3f}" if name in found else ""
