"""DeepSpeed's ZeRO, stage 1: every process keeps AdamW's moments, and a copy of the weights, for its share of what is trained.

How, is said to accelerate, as for FSDP2 (docs/machines.md). The engine gets the trained weights alone: passes go through
the backbone as ever, and gradients gather on each process until the step, so nothing travels in a micro-step.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from crd.errors import CRDError
from crd.update import filled

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroUpdate:
    """Sum over processes, clipping and step by DeepSpeed. Its checkpoints are those of every other way."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, clip_norm: float, accelerator: Accelerator
    ):
        import deepspeed

        config = _configuration(DeepSpeedPlugin(), accelerator)  # what accelerate was told
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.parameters, self.accelerator = parameters, accelerator
        self.engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(parameters), optimizer=optimizer, config={**config, "gradient_clipping": clip_norm}
        )
        self._make_state()

    def _make_state(self) -> None:
        """DeepSpeed makes the moments at its first step: this one is over zeros and at rate 0, and changes nothing."""
        rates = [group["lr"] for group in self.engine.optimizer.param_groups]
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0
        filled(self.parameters)
        self.engine.step()
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._count().zero_()

    def _count(self) -> Tensor:
        """AdamW's count of steps: one for all weights, as they are one piece of memory."""
        (state,) = self.engine.optimizer.state.values()
        return state["step"]

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """Root of the processes' summed squares: the gradient is summed only when it is applied."""
        gradients = filled(self.parameters)
        torch._foreach_mul_(gradients, self.accelerator.num_processes)  # DeepSpeed takes the mean
        norm = torch.nn.utils.get_total_norm(gradients)
        return self.accelerator.reduce(norm.square().reshape(1), "sum").sqrt()

    def apply(self, norm: float) -> float:
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state = {}
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, name)
                if self.accelerator.is_main_process:
                    state[f"optimizer/{index}/{name}"] = whole.cpu()
            state[f"optimizer/{index}/step"] = self._count().clone()
        return state

    def load_state(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for key, value in tensors:
            _, index, name = key.split("/")
            if name in MOMENTS:
                safe_set_full_optimizer_state(self.parameters[int(index)], value, name)
            else:
                self._count().copy_(value)
        self.engine.optimizer.refresh_fp32_params()  # its copy of the weights


def _configuration(plugin: DeepSpeedPlugin, accelerator: Accelerator) -> dict[str, Any]:
    """DeepSpeed's configuration; raises CRDError for settings that would do harm or do nothing."""
    told = plugin.deepspeed_config
    zero = told["zero_optimization"]
    wanted = {
        "zero_stage": (
            plugin.zero_stage,
            1,
            "stages 2 and 3 would send gradients in every backward pass; FSDP2 shares out gradients and backbone, too",
        ),
        "offload_optimizer_device": (plugin.offload_optimizer_device, "none", "it is not supported"),
        "overlap_comm": (zero.get("overlap_comm") or False, False, "gradients travel once, after the last backward pass"),
        "gradient_clipping": (plugin.gradient_clipping, "auto", "train.clip_norm does this"),
        "gradient_accumulation_steps": (plugin.gradient_accumulation_steps in (1, "auto"), True, "train.micro_batch does this"),
        "mixed_precision": (accelerator.mixed_precision, "no", "model.precision does this"),
        "optimizer": ("optimizer" in told, False, "train.learning_rate, betas and weight_decay do this"),
        "scheduler": ("scheduler" in told, False, "the learning rate is constant"),
    }
    for setting, (value, expected, why) in wanted.items():
        if value != expected:
            raise CRDError(
                f"accelerate's deepspeed setting {setting} is {value}, expected {expected}: {why}. "
                "Change it in accelerate's configuration; docs/machines.md has one that works."
            )
    settled = {key: value for key, value in zero.items() if value != "auto"}
    return {
        # it would copy every gradient into a buffer of reduce_bucket_size, which a process without samples does not have
        "zero_optimization": {**settled, "contiguous_gradients": False},
        "zero_allow_untested_optimizer": True,  # torch's AdamW
        "managed_gradient_accumulation": False,  # the step says when it is complete
        "train_micro_batch_size_per_gpu": 1,  # a number it asks for and only prints
        "steps_per_print": None,
    }
