"""Where each model family keeps its decoder layers, its attention and the last projection of its MLP."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from ..config import InPlaceTTTConfig
from ..errors import UserError


@dataclass(frozen=True)
class Family:
    """Two paths: decoder layers from the model's root, last projection from a layer."""

    layers: str
    projection: str


_GATED = Family("model.layers", "mlp.down_proj")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "apertus",
            "arcee",
            "cohere",
            "ernie4_5",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3_text",
            "glm",
            "glm4",
            "granite",
            "helium",
            "hunyuan_v1_dense",
            "llama",
            "ministral",
            "mistral",
            "olmo",
            "olmo2",
            "phi3",
            "qwen2",
            "qwen3",
            "qwen3_moe",
            "seed_oss",
            "smollm3",
        ),
        _GATED,
    ),
    "gpt2": Family("transformer.h", "mlp.c_proj"),
    "gpt_neox": Family("gpt_neox.layers", "mlp.dense_4h_to_h"),
    "starcoder2": Family("model.layers", "mlp.c_proj"),
}
"""Every family here passes tests/contract."""

ATTENTION_NAMES = ("self_attn", "attn", "attention", "linear_attn", "self_attention")

WITHOUT_MLP = ("biogpt", "opt", "xglm")
"""Model types whose decoder layers hold fc1 and fc2 without a module around them."""


@dataclass(frozen=True)
class Place:
    """Modules of one decoder layer that matter here."""

    index: int
    attention: nn.Module
    mlp: nn.Module
    name: str
    """Attribute of ``mlp`` that holds the projection."""


def family_of(model: PreTrainedModel, config: InPlaceTTTConfig) -> Family:
    """The model's family; UserError when it is not known and not described."""
    if config.layers_path is not None and config.projection_path is not None:
        return Family(config.layers_path, config.projection_path)
    model_type = model.config.model_type
    if model_type in WITHOUT_MLP:
        raise UserError(
            f"model type {model_type!r} cannot adapt: its last projection lies on the decoder layer itself, not in an "
            "MLP module, whose input the fast weights need"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"model type {model_type!r} is not in the table of families ({', '.join(sorted(FAMILIES))}). Describe it: "
            'InPlaceTTTConfig(layers_path="model.layers", projection_path="mlp.down_proj")'
        )
    return FAMILIES[model_type]


def decoder_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The list of decoder layers."""
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError as error:
        raise UserError(f"{type(model).__name__} has no module {family.layers!r} ({error})") from None
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{family.layers!r} of {type(model).__name__} is no list of layers")
    return layers


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer."""
    return next((m for name in ATTENTION_NAMES if (m := getattr(layer, name, None)) is not None), None)


def place(layers: nn.ModuleList, index: int, family: Family) -> Place:
    """What to adapt in layer ``index``; UserError with the reason when it cannot."""
    layer = layers[index]
    attention = attention_of(layer)
    if attention is None:
        raise UserError(f"layer {index} ({type(layer).__name__}) has no attention module named like {ATTENTION_NAMES}")
    mlp_path, _, name = family.projection.rpartition(".")
    mlp = layer.get_submodule(mlp_path) if _has(layer, mlp_path) else layer
    if not _has(layer, family.projection):
        dense = [i for i, other in enumerate(layers) if _has(other, family.projection)]
        if hasattr(mlp, "experts"):
            raise UserError(
                f"layer {index} is a mixture of experts ({type(mlp).__name__}): each token passes another expert, so "
                f"there is no one last projection to adapt. Choose dense layers: {dense or 'this model has none'}"
            )
        found = f"these have: {dense}" if dense else "nor has any other"
        raise UserError(f"layer {index} ({type(mlp).__name__}) has no projection {family.projection!r}; {found}")
    if mlp is layer:
        raise UserError(f"the projection {family.projection!r} must lie in an MLP module, not on the layer itself")
    return Place(index, attention, mlp, name)


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def supported_table() -> Iterator[tuple[str, str, str]]:
    """Rows (model_type, layers, projection) of the families' table, sorted."""
    for model_type in sorted(FAMILIES):
        yield model_type, FAMILIES[model_type].layers, FAMILIES[model_type].projection


if __name__ == "__main__":
    print("| model type | decoder layers | last projection |\n| --- | --- | --- |")
    for row in supported_table():
        print("| " + " | ".join(f"`{cell}`" for cell in row) + " |")
