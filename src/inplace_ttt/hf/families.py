"""Model families: paths of the decoder layers, the attention and the last projection of the MLP."""

import ast
import inspect
import textwrap
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import InPlaceTTTConfig
from ..errors import UserError


@dataclass(frozen=True)
class Family:
    """A model family's paths: decoder layers from the model's root, last projection from a layer."""

    layers: str
    projection: str
    shared: str | None = None
    """Last projection of the shared expert, in layers that are a mixture of experts."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Return the possible paths from a layer to its projection; the first that exists is used."""
        return (self.projection,) if self.shared is None else (self.projection, self.shared)


_LLAMA_LIKE = (
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "mistral", "olmo", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "qwen3_5_text", "qwen3_moe", "seed_oss", "smollm3",
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(_LLAMA_LIKE, Family("model.layers", "mlp.down_proj")),
    **dict.fromkeys(("gemma3", "mistral3", "qwen3_5"), Family("model.language_model.layers", "mlp.down_proj")),
    "deepseek_v3": Family("model.layers", "mlp.down_proj", shared="mlp.shared_experts.down_proj"),
    "gpt2": Family("transformer.h", "mlp.c_proj"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "lfm2": Family("model.layers", "feed_forward.w2"),
    "llama4_text": Family("model.layers", "feed_forward.down_proj"),
    "phi": Family("model.layers", "mlp.fc2"),
    "starcoder2": Family("model.layers", "mlp.c_proj"),
}
"""Every family here passes tests/contract."""

_LOOPED = "they run their layers several times per token, so the fast weights would read each token as often"
_FLAT = "their decoder layers have no MLP module, they call its two projections themselves"

REFUSED: dict[str, str] = {
    "biogpt": _FLAT,
    "hrm_text": _LOOPED,
    "inkling2_loop_text": _LOOPED,
    "opt": _FLAT,
    "xglm": _FLAT,
}
"""Families that cannot adapt, with the reason. Those that ``check_layers`` detects are not listed."""

ATTENTION_NAMES = ("self_attn", "attn", "attention", "linear_attn", "self_attention")


@dataclass(frozen=True)
class ModulePaths:
    """A record of the modules to adapt in one decoder layer."""

    index: int
    attention: nn.Module
    mlp: nn.Module
    name: str
    """Attribute of ``mlp`` that holds the projection."""


def family_of(model: PreTrainedModel, config: InPlaceTTTConfig) -> Family:
    """Return the model's family; UserError when it is unknown and not described, or cannot adapt."""
    model_type = model.config.model_type
    if model_type in REFUSED:
        raise UserError(f"{model_type} models cannot have fast weights: {REFUSED[model_type]}")
    if config.layers_path is not None and config.projection_path is not None:
        return Family(config.layers_path, config.projection_path)
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not in the table of families ({', '.join(sorted(FAMILIES))}). Describe it: "
            'InPlaceTTTConfig(layers_path="model.layers", projection_path="mlp.down_proj")'
        )
    return FAMILIES[model_type]


def decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} has no module {family.layers!r} ({error})") from None
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{family.layers!r} of {type(model).__name__} is not a list of layers")
    return layers


def text_model(model: PreTrainedModel, family: Family) -> nn.Module:
    """Return the module that runs the decoder layers: the base model, or the language model inside it."""
    return model.get_submodule(family.layers.rpartition(".")[0])


def attention_of(layer: nn.Module) -> nn.Module | None:
    name = _attention_name(layer)
    return None if name is None else getattr(layer, name)


def _attention_name(layer: nn.Module) -> str | None:
    return next((name for name in ATTENTION_NAMES if getattr(layer, name, None) is not None), None)


def place(layers: nn.ModuleList, index: int, family: Family) -> ModulePaths:
    """Return the modules to adapt in layer ``index``; UserError with the reason when it cannot adapt."""
    layer = layers[index]
    attention = attention_of(layer)
    if attention is None:
        others = [i for i, other in enumerate(layers) if attention_of(other) is not None]
        raise UserError(
            f"layer {index} ({type(layer).__name__}) has no attention module named like {ATTENTION_NAMES}. "
            f"Choose layers with attention: {others or 'this model has none'}"
        )
    path = _projection_path(layer, family)
    if path is None:
        path = family.projection
        mlp_path = path.rpartition(".")[0]
        mlp = layer.get_submodule(mlp_path) if _has(layer, mlp_path) else layer
        dense = [i for i, other in enumerate(layers) if _projection_path(other, family) is not None]
        if hasattr(mlp, "experts"):
            raise UserError(
                f"layer {index} is a mixture of experts ({type(mlp).__name__}): each token passes another expert, so "
                f"there is no one last projection to adapt. Choose dense layers: {dense or 'this model has none'}"
            )
        found = f"choose layers that have it: {dense}" if dense else f"no layer has a module {path!r}"
        raise UserError(f"layer {index} ({type(mlp).__name__}) has no projection {path!r}; {found}")
    mlp_path, _, name = path.rpartition(".")
    if not mlp_path:
        raise UserError(f"the projection {path!r} must lie in an MLP module, not on the layer itself")
    return ModulePaths(index, attention, layer.get_submodule(mlp_path), name)


def check_layers(layers: nn.ModuleList, places: Collection[ModulePaths]) -> None:
    """Raise UserError if the chosen layers would not receive the call's context, or would read tokens twice.

    The context is a keyword argument of attention, so a decoder layer has to pass those on. That is checked in its
    source code, because a trial forward would be too expensive on a big model.
    """
    for where in places:
        layer = layers[where.index]
        if not _passes_keywords(layer):
            raise UserError(
                f"{type(layer).__name__} does not pass keyword arguments on to its attention, so its fast weights "
                "could not tell which document they read: this family cannot adapt"
            )
        own = where.mlp, getattr(where.mlp, where.name)
        for i, other in enumerate(layers):
            found = next((m for m in other.modules() if m in own), None) if i != where.index else None
            if found is not None:
                raise UserError(
                    f"layers {where.index} and {i} share one {type(found).__name__}, whose fast weights would read "
                    "each token twice: choose layers with an MLP of their own"
                )


def _passes_keywords(layer: nn.Module) -> bool:
    """Tell if the layer's own code calls its attention with ``**kwargs``; True where the code cannot be read."""
    kind: Any = type(getattr(layer, "_orig_mod", layer))
    name = _attention_name(layer)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name
    ]
    return not calls or any(keyword.arg is None for call in calls for keyword in call.keywords)


def _projection_path(layer: nn.Module, family: Family) -> str | None:
    return next((path for path in family.projections if _has(layer, path)), None)


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


if __name__ == "__main__":
    print("| model type | decoder layers | last projection |\n| --- | --- | --- |")
    for model_type, family in sorted(FAMILIES.items()):
        print(f"| `{model_type}` | `{family.layers}` | `{'` or `'.join(family.projections)}` |")
