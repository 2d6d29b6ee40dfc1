"""GRPO with one advantage per token: TRL's GRPOTrainer with the baselines of `inplace_ttt.rl.baselines`.

Overrides private methods of trl 1.16; tests/rl/test_trl_contract.py fails when they move.
"""

import copy
import inspect
import textwrap
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, nanstd

from ..errors import UserError
from ..hf.attach import is_attached, unwrap
from ..hf.auto import base_config
from .baselines import USES_ENERGY, Advantages, energy_proxy, realised_energy, token_advantages
from .config import OTBConfig
from .noise import half_gradients, noise_and_signal, shrinkage


class OTBTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages [B, T] come from the baseline that its `OTBConfig` names.

    Takes the arguments of trl's GRPOTrainer, by name from the fifth on. ``model`` may have fast weights
    (`inplace_ttt.attach`): completions are then generated and scored with updates on, and the reference model of
    ``beta`` > 0 is a copy of the model as it was given, fast weights included. vLLM and continuous batching do not
    support fast weights and are refused.

    Logs, beside GRPO's metrics: ``otb/w`` (mean energy of a token), ``otb/energy`` (mean energy of a completion),
    ``otb/baseline`` (mean over tokens), ``otb/lone_tail`` (share of tokens where one completion of a group is left),
    and with ``noise_every`` ``otb/signal_sq``, ``otb/noise_sq`` and ``otb/shrinkage`` (see `inplace_ttt.rl.noise`).
    The logged advantage of a completion is the mean over its tokens.

    Raises UserError when settings do not fit the model.
    """

    args: Any  # an OTBConfig
    model: Any
    num_generations: Any
    num_generations_eval: Any
    _logs: Any
    _tag_names: Any = ["trl", "grpo", "otb"]  # noqa: RUF012
    _name = "OTB"
    _paper: Any = {  # noqa: RUF012
        "title": "The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL",
        "id": "2602.07078",
        "citation": textwrap.dedent("""\
            @inproceedings{li2026optimal,
                title     = {{The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL}},
                author    = {Yingru Li and Jiawei Xu and Ziniu Li and Jiacai Liu and Wei Liu and Yuxuan Tong and
                             Longtao Zheng and Zhenghai Xue and Yaxiang Zhang and Tianle Cai and Ge Zhang and
                             Qian Liu and Baoxiang Wang},
                booktitle = {International Conference on Machine Learning},
                year      = 2026,
                eprint    = {arXiv:2602.07078},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OTBConfig | None = None,
        train_dataset: Any = None,
        *,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        if not isinstance(args, OTBConfig):
            raise UserError(f"args must be an OTBConfig, got {type(args).__name__}: OTBConfig(output_dir, ...)")
        attached = _has_fast_weights(model)
        if attached:
            _check_generation(args)
        copied = attached and args.beta != 0 and peft_config is None and not is_peft_model(model)
        reference = copy.deepcopy(model) if copied else None
        beta, sync = args.beta, args.sync_ref_model
        if copied:  # trl would load the reference from the checkpoint's path, without fast weights
            args.beta, args.sync_ref_model = 0.0, False
        try:
            super().__init__(model, reward_funcs, args, train_dataset, peft_config=peft_config, **others)
        finally:
            args.beta, args.sync_ref_model = beta, sync
        root = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._add_head(root, ("log_probs", "entropy", "log_sum_sq_probs"))
        if reference is not None:
            self._add_reference(reference)
        if args.noise_every and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UserError("noise_every needs whole parameters on every process: set it to 0 under FSDP and DeepSpeed")
        self._rewards_per_func: Tensor | None = None
        self._rollouts = 0

    def _add_head(self, model: Any, outputs: tuple[str, ...]) -> None:
        add_fused_lm_head(
            model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32, outputs=outputs
        )

    def _add_reference(self, reference: Any) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("beta > 0 on a model with fast weights needs one copy per process: no FSDP, no DeepSpeed")
        if self.args.cast_lm_head_to_fp32:
            raise UserError("cast_lm_head_to_fp32 with beta > 0 is not supported for models with fast weights")
        if self.args.disable_dropout:
            disable_dropout_in_model(reference)
        self._add_head(reference, ("log_probs",))
        self.beta = self.args.beta
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.args.sync_ref_model:
            self.add_callback(SyncRefModelCallback(ref_model=self.ref_model, accelerator=self.accelerator))

    # -- advantages ----------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        group_size: int = self.num_generations if mode == "train" else self.num_generations_eval
        rewards = self._rewards()
        mask = _sampled(output)
        ratios = output.get("importance_sampling_ratio")
        ratios = torch.ones_like(mask) if ratios is None else ratios.float().expand(mask.shape)
        w = self._proxy(output) if self.args.baseline in USES_ENERGY else torch.zeros_like(mask)
        # One row per completion of all processes, in the order of the rewards.
        padded = self.accelerator.pad_across_processes(torch.stack([w, mask, ratios], dim=-1), dim=1)
        w, mask, ratios = self.accelerator.gather(padded).unbind(-1)

        def advantages(leave_one_out: bool) -> Advantages:
            return token_advantages(
                rewards, mask, w, group_size=group_size, baseline=self.args.baseline, leave_one_out=leave_one_out,
                lone_tail=self.args.lone_tail, ratios=ratios,
            )  # fmt: skip

        here = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        tokens = output["completion_ids"].shape[1]
        found = advantages(self.args.leave_one_out)
        scale = self._scale(rewards, group_size)
        values = found.values * scale
        output["advantages"] = values[here, :tokens].contiguous()

        self._log_baseline(mode, found, w * ratios**2, mask)
        self._replace_logged(values, mask)
        if mode == "train" and self.args.noise_every:
            if self._rollouts % self.args.noise_every == 0:
                unbiased = found if self.args.leave_one_out else advantages(True)
                self._log_noise(output, (unbiased.values * scale)[here, :tokens], here.start, len(mask) // group_size)
            self._rollouts += 1
        return output

    def _rewards(self) -> Tensor:
        """Return the weighted reward of every completion of all processes; NaN where no function gave one."""
        assert self._rewards_per_func is not None
        each, self._rewards_per_func = self._rewards_per_func, None
        total = (each * self.reward_weights.to(each.device)).nansum(dim=1)
        return total.masked_fill(each.isnan().all(dim=1), torch.nan)

    def _scale(self, rewards: Tensor, group_size: int) -> Tensor:
        """Return the factor [rows, 1] of each completion's advantages that ``scale_rewards`` asks for."""
        if self.scale_rewards == "none":
            return torch.ones_like(rewards)[:, None]
        groups = rewards.view(-1, group_size) if self.scale_rewards == "group" else rewards[None]
        std = torch.nan_to_num(nanstd(groups, dim=1))  # NaN: of a single row
        return 1 / (std[:, None].expand_as(groups).reshape(-1, 1) + 1e-4)

    def _proxy(self, output: dict[str, Any]) -> Tensor:
        """Return w [B, T] of this process's completions, by a forward without gradients in micro-batches."""
        training = self.model.training
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size
        tokens = output["completion_ids"].shape[1]
        takes = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        inputs = {name: value for name, value in output.items() if name in takes}  # of images, for example
        squares: list[Tensor] = []

        def keep(module: nn.Module, args: Any, result: Any) -> None:
            squares.append(result.log_sum_sq_probs[:, -tokens:])

        handle = self.model.register_forward_hook(keep)
        try:
            with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                log_probs = self._score(output, batch_size=size, **inputs)
        finally:
            handle.remove()
        return energy_proxy(log_probs.float(), torch.cat(squares).float())

    def _score(self, output: dict[str, Any], **more: Any) -> Tensor:
        """Return the log-probabilities [B, T] of completions under the model, at the sampling temperature."""
        log_probs: Tensor = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
            torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
            output["completion_ids"].shape[1],
            **more,
        )[0]
        return log_probs

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Count positions from the first real token, as ``generate`` does; trl counts the padding before it."""
        root = unwrap(self.accelerator.unwrap_model(model))
        handle = root.base_model.register_forward_pre_hook(_add_positions, with_kwargs=True)
        try:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            handle.remove()

    # -- what is logged ------------------------------------------------------------------------------------------------

    def _log_baseline(self, mode: str, found: Advantages, w: Tensor, mask: Tensor) -> None:
        count = mask.sum().clamp(min=1)
        values = {"baseline": found.baseline.sum() / count, "lone_tail": found.is_lone.sum() / count}
        if self.args.baseline in USES_ENERGY:
            rows = mask.any(1).sum().clamp(min=1)
            values |= {"w": (w * mask).sum() / count, "energy": realised_energy(w, mask)[:, -1].sum() / rows}
        for name, value in values.items():
            self._metrics[mode][f"otb/{name}"].append(value.item())

    def _replace_logged(self, values: Tensor, mask: Tensor) -> None:
        """Put each completion's mean advantage into the table of completions, where GRPO's advantages were."""
        logged = self._logs["advantages"]
        for _ in range(min(len(values), len(logged))):
            logged.pop()
        logged.extend((values.sum(1) / mask.sum(1).clamp(min=1)).tolist())

    def _log_noise(self, output: dict[str, Any], unbiased: Tensor, first_row: int, groups: int) -> None:
        """Measure the gradient on two halves of the prompts, with the used advantages and with ``unbiased`` [B, T]."""
        if output.get("pixel_values") is not None:
            raise UserError("noise_every measures text models only: set it to 0")
        rows = torch.arange(first_row, first_row + len(unbiased), device=unbiased.device)
        group_size = self.num_generations
        half = (rows // group_size) % 2
        half[rows // group_size >= groups // 2 * 2] = -1  # an odd group is left out, so that the halves are equal
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")

        def score(chosen: Tensor) -> Tensor:
            return self._score({name: output[name][chosen] for name in names})

        mask = _sampled(output)
        kinds = [output["advantages"] * mask, unbiased * mask]
        tokens = groups // 2 * group_size * self.max_completion_length
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        halves = half_gradients(score, kinds, half, parameters, self.args.per_device_train_batch_size, tokens)
        reduced = [[self.accelerator.reduce(g, reduction="sum") for g in gradients] for gradients in halves]
        for name, value in noise_and_signal(*reduced).items():
            self._metrics["train"][f"otb/{name}"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the shrinkage since the last log, as a ratio of means, which single measurements are too noisy for."""
        metrics = self._metrics["train"]
        if self.model.training and metrics.get("otb/cross"):
            cross, unbiased = (metrics.pop(f"otb/{name}") for name in ("cross", "unbiased_signal_sq"))
            metrics["otb/shrinkage"] = [shrinkage(cross, unbiased)]
        super().log(logs, start_time)


def _sampled(output: dict[str, Any]) -> Tensor:
    """Return the mask [B, T] (1.0) of tokens that the model sampled: neither padding nor a tool's output."""
    mask: Tensor = output["completion_mask"]
    return (mask * output["tool_mask"] if "tool_mask" in output else mask).float()


def _add_positions(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs.get("attention_mask")
    is_text = module.config.get_text_config() is module.config  # others may count positions in several dimensions
    takes = "position_ids" in inspect.signature(module.forward).parameters
    if mask is None or kwargs.get("position_ids") is not None or not is_text or not takes:
        return None
    return args, kwargs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _has_fast_weights(model: Any) -> bool:
    if not isinstance(model, str):
        return is_attached(model)
    if base_config(model)[1] is not None:
        raise UserError(f"{model} has fast weights: load it (inplace_ttt.from_pretrained) and pass the model itself")
    return False


def _check_generation(args: OTBConfig) -> None:
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            raise UserError(
                f"{name}=True would generate without fast weights, so completions would not come from the model that "
                f"is trained: set {name}=False (model.generate)"
            )
