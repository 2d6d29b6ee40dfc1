"""Replacements of an attached model's own methods. They run the original, of the model's class or another library's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .context import Runtime, no_continuous_batching
from .directory import CONFIG, SETTINGS, UPLOADING, mark_config, take, upload


class Forward:
    """A wrapper of the base model's forward that clears an interrupted call: PyTorch does not run hooks then."""

    def __init__(self, runtime: Runtime, module: nn.Module) -> None:
        self.runtime, self.module = runtime, module
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")
        """The module's own ``forward`` attribute, if it had one."""

    @property
    def __signature__(self) -> inspect.Signature:  # transformers reads accepted arguments from it
        return inspect.signature(type(self.module).forward.__get__(self.module) if self.own is None else self.own)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        # Not as a bound method: compiled code looks it up again after a graph break, and would find this object.
        kind: Any = type(self.module)
        return kind.forward(self.module, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        try:
            return self._forward(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                self.runtime.after_model(self.module, args, None)
            raise

    def remove(self) -> None:
        """Restore the previous ``forward``, unless other code has replaced this one since."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.own is not None:
                self.module.__dict__["forward"] = self.own


class PrepareInputs:
    """A wrapper of ``generate``'s own method. Without a mask, or with one just extended, the next token is real."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def __signature__(self) -> inspect.Signature:  # transformers reads accepted arguments from it
        return inspect.signature(self._own)

    @property
    def _own(self) -> Any:
        model: Any = self.runtime.model
        return type(model).prepare_inputs_for_generation.__get__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mask, runtime = kwargs.get("attention_mask"), self.runtime
        runtime.tokens_are_real.set(mask is None or mask is runtime.extended_mask.get())
        runtime.extended_mask.clear()
        inputs = self._own(*args, **kwargs)
        made = inputs.get("attention_mask")
        runtime.prepared_mask.set((None, None) if made is mask else (made, mask))
        return inputs


class Overrides:
    """Methods of an attached model in place of its class's."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.model = runtime, runtime.model
        self.plain: Any = type(runtime.model)

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Return the replacements by the name of the replaced method."""
        loss_forward = self.runtime.loss_forward
        return {
            "_valid_auto_compile_criteria": self.may_compile,
            "prepare_inputs_for_generation": PrepareInputs(self.runtime),
            "_update_model_kwargs_for_generation": self.extend_mask,
            "init_continuous_batching": no_continuous_batching,
            "save_pretrained": self.save_pretrained,
            **({} if loss_forward is None else {"forward": loss_forward, "generate": self.generate}),
        }

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Record the prompt length, to tell read tokens from written ones."""
        given = [inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        prompt = next((x.shape[1] for x in given if isinstance(x, Tensor)), 1)
        with self.runtime.prompt.as_(prompt):
            return self.plain.generate(self.model, inputs, *args, **kwargs)

    def may_compile(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """Tell if ``generate`` may compile the forward with a static cache: single steps, not pieces of a prompt."""
        pieces = getattr(generation_config, "prefill_chunk_size", None) is not None
        if pieces or not self.runtime.settings.rule.linear or self.runtime.loss_forward is not None:
            return False
        found: bool = self.plain._valid_auto_compile_criteria(self.model, model_kwargs, generation_config)
        return found

    def extend_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Record the mask to which ``generate`` adds the written token."""
        found = self.plain._update_model_kwargs_for_generation(self.model, *args, **kwargs)
        self.runtime.extended_mask.set(found.get("attention_mask"))
        return found

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does (the Trainer calls it), with this library's ``config.json``.

        The weights are in the files that the Trainer loads when it resumes. ``push_to_hub`` uploads the directory.
        """
        path, uploading = Path(save_directory), take(kwargs, UPLOADING) if push_to_hub else {}
        self.plain.save_pretrained(self.model, path, is_main_process, state_dict, **kwargs)
        writes = getattr(self.model, "should_save_on_this_rank", lambda main: main)(is_main_process)
        if writes and (path / CONFIG).is_file():
            mark_config(path)
            (path / SETTINGS).unlink(missing_ok=True)  # of a model that was saved there before
        if writes and push_to_hub:
            upload(path, **uploading)


class InitWeights:
    """A replacement of a model's ``_init_weights`` that also initialises the added parameters (after ``to_empty``)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, module: nn.Module) -> None:
        if getattr(module, "_inplace_ttt_added", False):
            module.reset_parameters()  # type: ignore[operator]
        else:
            own: Any = type(self.model)._init_weights
            own(self.model, module)
