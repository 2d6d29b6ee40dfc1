"""The settings of a training run by name: a recipe's sections and their defaults."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from inplace_ttt.config import InPlaceTTTConfig
from inplace_ttt.train import SMALLEST_VOCABULARY
from inplace_ttt.train.schema import build

Count = Annotated[int, 1]
CountOrZero = Annotated[int, 0]
NotNegative = Annotated[float, 0]


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
    """A byte-level BPE trained on ``max_bytes`` of the training split."""

    vocab_size: Annotated[int, SMALLEST_VOCABULARY]
    max_bytes: int = 32_000_000


@dataclass(frozen=True)
class TokenizerSpec:
    """Either ``path`` (a directory or hub id) or ``train``. Left out: the base model's tokenizer."""

    shorthand: ClassVar = "path"

    path: str | None = None
    train: TrainedTokenizer | None = None


@dataclass(frozen=True)
class DomainSpec:
    """Sources (see `inplace_ttt.train.sources`); of all their documents ``max_bytes``, those whose hash is lowest."""

    shorthand: ClassVar = "sources"

    sources: tuple[str, ...]
    max_bytes: Count | None = None


@dataclass(frozen=True)
class DataSpec:
    """Named domains of every split; only ``train`` is needed. ``cache`` keeps the tokens between runs.

    ``tokenise``: the training split's tokens are made before training and kept, or while training and not kept.
    """

    train: dict[str, DomainSpec]
    validation: dict[str, DomainSpec] = field(default_factory=dict)
    test: dict[str, DomainSpec] = field(default_factory=dict)
    cache: str = "out/tokens"
    tokenise: Literal["before", "while_training"] = "before"


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW. ``min_lr_ratio`` is where the cosine ends, as a share of ``lr``.

    ``ttt_lr``: of the target's parameters (``mlp.ttt_*``), with the same warm-up and schedule; left out: ``lr``.
    """

    lr: float
    ttt_lr: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: CountOrZero = 0
    min_lr_ratio: NotNegative = 0.0
    weight_decay: NotNegative = 0.1
    decay_embeddings: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: NotNegative = 1.0


@dataclass(frozen=True)
class EvaluationSpec:
    """Measurement of losses: during training on ``rows`` validation rows a domain, at the end on test windows.

    ``length``: tokens of a test window (left out: the sequence length); ``windows``: the most of one document;
    ``piece``: tokens read at a time; ``edges``: positions between the buckets; ``batch_size``: windows side by side.
    """

    rows: Count = 8
    length: Annotated[int, 2] | None = None
    windows: Count = 4
    piece: Count = 2048
    edges: tuple[int, ...] = ()
    batch_size: Count = 1


@dataclass(frozen=True)
class ParallelSpec:
    """Processes that share a run, ``data * shard * context * tensor`` of them.

    ``shard``: FSDP2, parameters cut over these processes, each reading other rows; ``data``: copies of that;
    ``context``: every row cut into slices; ``tensor``: matrices split as transformers plans it for a base model.
    ``slices``, ``attention``: see `inplace_ttt.hf.parallel.enable_context_parallel`.
    """

    data: Count = 1
    shard: Count = 1
    context: Count = 1
    tensor: Count = 1
    slices: Literal["head_tail", "contiguous"] = "head_tail"
    attention: Literal["gather", "torch"] = "gather"

    @property
    def processes(self) -> int:
        return self.data * self.shard * self.context * self.tensor


@dataclass(frozen=True)
class Recipe:
    """One training run. ``ttt`` holds the fields of `InPlaceTTTConfig`; left out or null: the plain model.

    ``align_documents``: documents packed in a row begin at multiples of ``ttt.chunk_size``. ``cut_multiple``: documents
    longer than a row are cut at multiples of so many of their tokens; left out: ``ttt.chunk_size``. ``parallel``:
    several processes (and checkpoints that any number of them can resume). ``ttt_relative_update`` chooses the inner
    learning rate from measured sizes (see `inplace_ttt.train.sizes`). ``teach``: weight of the auxiliary loss that
    pulls the target's values towards minus the gradient of the loss (see `inplace_ttt.core.teaching`); ``teach_alone``:
    the target learns from nothing else. ``trainable``: everything, or the base frozen and
    only the convolution and projection of the targets trained ("adapter"), optionally with the adapting projections.
    ``report_to``: tensorboard, wandb. ``peak_tflops``: of one device, for the log's MFU; left out: that of known GPUs.
    """

    name: str
    output: str
    model: ModelSpec
    data: DataSpec
    optimizer: OptimizerSpec
    sequence_length: Annotated[int, 2]
    steps: Count
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    ttt: dict[str, Any] | None = None
    ttt_lr_warmup_steps: CountOrZero = 0
    ttt_relative_update: float | None = None
    teach: NotNegative = 0.0
    teach_alone: bool = False
    trainable: Literal["all", "adapter", "adapter_and_projections"] = "all"
    activation_checkpointing: bool = False
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    peak_tflops: float | None = None
    batch_size: Count = 1
    gradient_accumulation: Count = 1
    precision: Literal["bf16", "fp32"] = "fp32"
    attn_implementation: Literal["auto", "varlen", "flex_attention", "sdpa", "eager"] = "auto"
    compile: bool = False
    liger: bool = False
    align_documents: bool = False
    cut_multiple: int | None = None
    parallel: ParallelSpec | None = None
    seed: CountOrZero = 0
    log_every: Count = 10
    eval_every: CountOrZero = 0
    save_every: CountOrZero = 0
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    raw: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def evaluation_length(self) -> int:
        return self.evaluation.length or self.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step of the optimizer reads, padding included."""
        return self.batch_size * self.gradient_accumulation * self.sequence_length

    def ttt_config(self) -> InPlaceTTTConfig | None:
        """Return the library's own configuration object, None for the plain model. Raises UserError for bad values."""
        return None if self.ttt is None else build(InPlaceTTTConfig, self.ttt, "ttt")
