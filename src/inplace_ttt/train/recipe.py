"""A training run as one YAML file, checked in full before anything is loaded.

``${NAME}`` in any text is an environment variable; relative paths start at the current directory.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

import inplace_ttt
from inplace_ttt.errors import in_one_line
from inplace_ttt.train.packages import SplitRule
from inplace_ttt.train.parallel_spec import ParallelSpec
from inplace_ttt.train.recipe_checks import check
from inplace_ttt.train.schema import RecipeError, build, expand_variables, load_yaml

if TYPE_CHECKING:
    from inplace_ttt.config import InPlaceTTTConfig


@dataclass(frozen=True)
class ModelSpec:
    """Either ``base`` (a directory or hub id) or ``config`` (``model_type`` and its settings, trained from scratch).

    ``settings`` replace fields of the base's configuration, such as ``rope_parameters`` for YaRN.
    """

    base: str | None = None
    config: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedTokenizer:
    """A byte-level BPE trained on the training split; ``max_bytes`` of it are looked at."""

    vocab_size: int
    max_bytes: int = 32_000_000


@dataclass(frozen=True)
class TokenizerSpec:
    """Either ``path`` (a directory or hub id) or ``train``. Left out: the base model's tokenizer."""

    path: str | None = None
    train: TrainedTokenizer | None = None

    @staticmethod
    def from_shorthand(value: object) -> object:
        """A bare text is the path."""
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class DomainSpec:
    """Sources (see `inplace_ttt.train.sources`); of all their documents ``max_bytes``, those whose hash is lowest.

    The manifest of installed distributions lists what was read, not what ``max_bytes`` left of it.
    """

    sources: tuple[str, ...]
    max_bytes: int | None = None

    @staticmethod
    def from_shorthand(value: object) -> object:
        """A bare text or list is the sources."""
        return {"sources": value} if isinstance(value, str | list) else value


@dataclass(frozen=True)
class DataSpec:
    """Named domains of every split; only ``train`` is needed. ``cache`` keeps the tokens between runs.

    ``tokenise``: the training split's tokens are made before training and kept, or while training and not kept.
    """

    train: dict[str, DomainSpec]
    validation: dict[str, DomainSpec] = field(default_factory=dict)
    test: dict[str, DomainSpec] = field(default_factory=dict)
    packages: SplitRule = field(default_factory=SplitRule)
    cache: str = "out/tokens"
    tokenise: Literal["before", "while_training"] = "before"

    def split(self, name: str) -> dict[str, DomainSpec]:
        """Domains of a split by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW. ``min_lr_ratio`` is where the cosine ends, as a share of ``lr``."""

    lr: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class EvaluationSpec:
    """How losses are measured: during training on ``rows`` validation rows a domain, at the end on test windows.

    ``length``: tokens of a test window (left out: the sequence length); ``windows``: the most of one document;
    ``piece``: tokens read at a time; ``edges``: positions between the buckets; ``batch_size``: windows side by side.
    """

    rows: int = 8
    length: int | None = None
    windows: int = 4
    piece: int = 2048
    edges: tuple[int, ...] = ()
    batch_size: int = 1


@dataclass(frozen=True)
class Recipe:
    """One training run. ``ttt`` holds the fields of `InPlaceTTTConfig`; left out or null: the plain model.

    ``align_documents``: documents packed in a row begin at multiples of ``ttt.chunk_size``. ``cut_multiple``: documents
    longer than a row are cut at multiples of so many of their tokens; left out: ``ttt.chunk_size``. ``parallel``:
    several processes (and checkpoints that any number of them can go on from).
    ``ttt_relative_update`` chooses the inner learning rate from measured sizes (see `inplace_ttt.train.inner_lr`).
    ``trainable``: everything, or the base frozen and only the convolution and projection of the targets trained
    ("adapter"), optionally with the adapting projections. ``report_to``: tensorboard, wandb. ``peak_tflops``: of one
    device, for the log's MFU; left out: that of known GPUs.
    """

    name: str
    output: str
    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    sequence_length: int
    steps: int
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    ttt: dict[str, Any] | None = None
    ttt_lr_warmup_steps: int = 0
    ttt_relative_update: float | None = None
    trainable: Literal["all", "adapter", "adapter_and_projections"] = "all"
    activation_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    peak_tflops: float | None = None
    batch_size: int = 1
    gradient_accumulation: int = 1
    precision: Literal["bf16", "fp32"] = "fp32"
    attn_implementation: Literal["auto", "varlen", "flex_attention", "sdpa", "eager"] = "auto"
    compile: bool = False
    align_documents: bool = False
    cut_multiple: int | None = None
    parallel: ParallelSpec | None = None
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    raw: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def alignment(self) -> int:
        """Documents begin at multiples of this many tokens in a row."""
        config = self.ttt_config() if self.align_documents else None
        return 1 if config is None else config.chunk_size

    @property
    def cut(self) -> int:
        """Documents longer than a row are cut at multiples of this many of their tokens."""
        config = self.ttt_config()
        return self.cut_multiple or (1 if config is None else config.chunk_size)

    @property
    def evaluation_length(self) -> int:
        """Tokens of a test window."""
        return self.evaluation.length or self.sequence_length

    def ttt_config(self) -> "InPlaceTTTConfig | None":
        """The library's own configuration object, None for the plain model. Raises UserError for bad values."""
        if self.ttt is None:
            return None
        from inplace_ttt.config import InPlaceTTTConfig

        return build(InPlaceTTTConfig, self.ttt, "ttt")


def find_recipe(name: str | Path) -> Path:
    """A file, or one of the shipped recipes: NAME, NAME.yaml or recipes/NAME.yaml. Raises RecipeError."""
    path = Path(name)
    stem = path.name.removesuffix(".yaml")
    if path.is_file() or str(path) not in (stem, f"{stem}.yaml", str(Path("recipes", f"{stem}.yaml"))):
        return path
    folders = (Path(inplace_ttt.__file__).parent / "recipes", Path(inplace_ttt.__file__).parents[2] / "recipes")
    shipped = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if stem in shipped:
        return shipped[stem]
    raise RecipeError(f"{name}: no such file, nor a recipe of that name, only {', '.join(sorted(shipped))}")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, data: bool = True) -> Recipe:
    """Reads and checks a recipe. ``overrides`` are ``key.sub=value`` with a YAML value. Raises RecipeError.

    ``data``: whether its data must be there (a plan needs none).
    """
    try:
        values = load_yaml(find_recipe(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML ({in_one_line(error, None)})") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected settings (key: value)")
    for override in overrides:
        apply_override(values, override)
    return make_recipe(values, data=data)


def make_recipe(values: Mapping[str, Any], *, data: bool = True) -> Recipe:
    """A checked recipe from plain values. Raises RecipeError. ``data``: as ``load_recipe`` has it."""
    recipe = build(Recipe, expand_variables(dict(values), optional=None if data else "data"))
    object.__setattr__(recipe, "raw", dict(values))  # as written: results then name no machine's paths
    check(recipe, data)
    return recipe


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets ``key.sub=value`` in place."""
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise RecipeError(f"{override!r}: write key=value or key.sub=value")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML ({in_one_line(error, None)})") from None
    *folders, last = key.split(".")
    for folder in folders:
        if not isinstance(values.get(folder), dict):
            values[folder] = {}
        values = values[folder]
    values[last] = value
