"""Settings of `OTBTrainer`: those of TRL's GRPOTrainer, with other defaults and the baseline's own."""

import warnings
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from ..errors import UserError
from .baselines import check_names

try:
    _found = version("trl")
except PackageNotFoundError:
    _found = ""
if _found.split(".")[:2] != ["1", "16"]:  # OTBTrainer overrides private methods, which move between minor versions
    _what = f"trl {_found} is installed" if _found else "trl is not installed"
    raise UserError(f"OTBTrainer needs trl 1.16, {_what}: pip install -e '.[rl]' in a clone")

from trl.trainer.grpo_config import GRPOConfig


@dataclass
class OTBConfig(GRPOConfig):
    """Settings of `OTBTrainer`: GRPOConfig, with ``loss_type="dr_grpo"`` and ``scale_rewards="none"`` as defaults.

    The other loss types and reward scales change what the baseline was chosen to minimise: a scale that is asked for
    divides the advantages, and weights of 1 / length warn. Raises UserError for settings in which one advantage per
    token has no meaning: sequence-level importance ratios, losses "luspo" and "vespo", ``normalize_then_sum``, a
    single generation per prompt, ``top_entropy_quantile`` below 1.
    """

    loss_type: str = field(default="dr_grpo", metadata={"help": "See GRPOConfig; not luspo or vespo."})
    scale_rewards: str = field(
        default="none", metadata={"help": "See GRPOConfig; 'group' and 'batch' divide the advantages."}
    )
    baseline: str = field(
        default="otb",
        metadata={"help": "otb, instant, optimal_trajectory, length, mean or none (inplace_ttt.rl.baselines)."},
    )
    leave_one_out: bool = field(
        default=False,
        metadata={"help": "Leave a completion out of its own baseline: the expected gradient does not shrink."},
    )
    lone_tail: str = field(
        default="reward",
        metadata={
            "help": "Advantage where a single completion of its group is still alive: the reward itself ('reward'), "
            "0 ('zero'), or the reward minus the group's mean ('mean')."
        },
    )
    noise_every: int = field(
        default=0,
        metadata={
            "help": "Measure the gradient's noise, signal and shrinkage at every so many generations (0: never). Each "
            "time costs one forward, two backward passes and four copies of the gradients."
        },
    )

    def __post_init__(self) -> None:
        check_names(self.baseline, self.lone_tail)
        for wrong, say in (
            (
                self.importance_sampling_level != "token",
                f'importance_sampling_level="{self.importance_sampling_level}" gives a whole completion one ratio, '
                'advantages are per token: use "token"',
            ),
            (
                self.loss_type in ("luspo", "vespo"),
                f'loss_type="{self.loss_type}" needs one advantage per completion: use "dr_grpo", "dapo" or "cispo"',
            ),
            (
                self.multi_objective_aggregation != "sum_then_normalize",
                f'multi_objective_aggregation="{self.multi_objective_aggregation}" normalises rewards before a '
                'baseline is taken: use "sum_then_normalize"',
            ),
            (
                self.num_generations is None or self.num_generations < 2,
                f"num_generations must be at least 2, got {self.num_generations}: a baseline needs other completions "
                "of the same prompt",
            ),
            (
                self.top_entropy_quantile < 1,
                f"top_entropy_quantile={self.top_entropy_quantile} drops tokens that the baseline counts: use 1.0",
            ),
            (self.noise_every < 0, f"noise_every must not be negative, got {self.noise_every}"),
        ):
            if wrong:
                raise UserError(say)
        if self.loss_type in ("grpo", "bnpo", "sapo"):
            warnings.warn(
                f'loss_type="{self.loss_type}" weights tokens by the length of their completion or batch, which '
                'changes the variance that the baseline minimises: "dr_grpo" does not',
                stacklevel=3,
            )
        super().__post_init__()  # type: ignore[no-untyped-call]
        groups = self.generation_batch_size // self.num_generations  # type: ignore[operator]
        if self.noise_every and groups < 2:
            raise UserError("noise_every compares two halves of the prompts: generate for at least 2 prompts at a time")
