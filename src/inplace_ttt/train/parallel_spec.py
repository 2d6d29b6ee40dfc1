"""A recipe's ``parallel`` section and what it excludes (docs/parallel.md)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from inplace_ttt.train.schema import RecipeError

if TYPE_CHECKING:
    from inplace_ttt.train.recipe import Recipe


@dataclass(frozen=True)
class ParallelSpec:
    """Processes that share a run, ``data * shard * context * tensor`` of them.

    ``shard``: FSDP2, parameters cut over these processes, each reading other rows; ``data``: copies of that;
    ``context``: every row cut into slices; ``tensor``: matrices split as transformers plans it for a base model.
    ``slices``, ``attention``: see `inplace_ttt.hf.parallel.enable_context_parallel`.
    """

    elsewhere: ClassVar[dict[str, str]] = {
        "activation_checkpointing": "write activation_checkpointing in the recipe itself"
    }

    data: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    slices: Literal["head_tail", "contiguous"] = "head_tail"
    attention: Literal["gather", "torch"] = "gather"

    @property
    def processes(self) -> int:
        return self.data * self.shard * self.context * self.tensor


def check_parallel(recipe: "Recipe") -> None:
    """Raises RecipeError for combinations that cannot work. Reads no data, starts no process."""
    spec = recipe.parallel
    if spec is None:
        return
    for name in ("data", "shard", "context", "tensor"):
        if getattr(spec, name) < 1:
            raise RecipeError(f"parallel.{name}: must be at least 1, got {getattr(spec, name)}")
    if recipe.compile:
        raise RecipeError("compile: not supported together with parallel, leave it out")
    readers = spec.data * spec.shard
    if recipe.batch_size % readers:
        raise RecipeError(
            f"batch_size: {recipe.batch_size} rows cannot be dealt to {readers} processes (parallel.data x "
            f"parallel.shard): use a multiple of {readers}"
        )
    if spec.tensor > 1:
        _check_tensor(recipe, spec)
    if spec.context > 1:
        _check_context(recipe, spec)


def _check_tensor(recipe: "Recipe", spec: ParallelSpec) -> None:
    if spec.processes != spec.tensor:
        raise RecipeError("parallel.tensor: not supported together with data, shard or context")
    if recipe.model.base is None:
        raise RecipeError("parallel.tensor: only for model.base (transformers splits a model while it loads it)")
    if recipe.precision == "bf16":
        raise RecipeError("parallel.tensor: needs precision: fp32 (it has no mixed precision)")
    if recipe.trainable != "all" or recipe.ttt_relative_update is not None:
        raise RecipeError(
            "parallel.tensor: trains all weights with a given ttt.lr: no trainable, no ttt_relative_update"
        )
    config = recipe.ttt_config()
    if config is not None and config.clip is not None:
        raise RecipeError("parallel.tensor: ttt.clip needs the norm of whole updates, leave it out (decay works)")


def _check_context(recipe: "Recipe", spec: ParallelSpec) -> None:
    config = recipe.ttt_config()
    pieces = spec.context * (2 if spec.slices == "head_tail" else 1)
    multiple = pieces * (1 if config is None else config.chunk_size)
    if recipe.sequence_length % multiple:
        raise RecipeError(
            f"sequence_length: {recipe.sequence_length} cannot be cut into {pieces} slices that end on chunk "
            f"boundaries: use a multiple of {multiple} (slices x ttt.chunk_size)"
        )
    if config is not None and not recipe.align_documents:
        raise RecipeError(
            "align_documents: must be true with parallel.context, so that no document's chunk lies on two processes"
        )
    if recipe.attn_implementation != "auto":
        raise RecipeError("attn_implementation: parallel.context chooses it, leave it out (auto)")
    window = (recipe.model.config or {}).get("sliding_window")
    if spec.attention == "torch" and (spec.slices != "head_tail" or window or recipe.align_documents):
        raise RecipeError(
            'parallel.attention: "torch" knows neither windows nor packed documents nor contiguous slices: use "gather"'
        )
