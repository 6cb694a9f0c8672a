"""Noise schedules of variance-preserving models (Stable Diffusion 1 and 2, SDXL) in the coordinates of flow.py."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from crd.errors import CRDError
from crd.flow import sigma_from_ratio, timestep_from_sigma, velocity_from_noise, velocity_from_v, vp_norm

_EULER = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
_SUPPORTED = (DDIMScheduler, PNDMScheduler, *_EULER, DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler)


@dataclass
class NoiseSchedule:
    """Grid, timesteps and kind of prediction of a pipeline's scheduler.

    Only the grid is taken from the scheduler; the steps along it are of our own solver. With Euler steps that is
    DDIM (eta 0) and Euler-discrete exactly; PNDM, DPM-Solver and ancestral pipelines draw other pictures.
    """

    scheduler: Any
    table: Tensor  # float32 noise level of every training timestep, ascending

    def __post_init__(self) -> None:
        self._placed = self.table  # where the model is: a copy in every pass would wait for the device

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """Raises CRDError for schedulers whose models are of another kind."""
        kind, config = type(scheduler).__name__, scheduler.config
        if not isinstance(scheduler, _SUPPORTED):
            known = ", ".join(known.__name__ for known in _SUPPORTED)
            raise CRDError(f"model.path: the pipeline's {kind} is not supported. Save the pipeline with one of {known}.")
        if config.prediction_type not in ("epsilon", "v_prediction") or config.get("timestep_type") == "continuous":
            raise CRDError(
                f"model.path: the pipeline's {kind} is set to prediction_type={config.prediction_type}, "
                f"timestep_type={config.get('timestep_type', 'discrete')}; supported are epsilon and v_prediction "
                "with discrete timesteps."
            )
        if isinstance(scheduler, PNDMScheduler):  # its timesteps are these, some of them twice
            scheduler = DDIMScheduler.from_config(config)
        ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        table = sigma_from_ratio(ratio)
        if config.prediction_type == "epsilon" and table[-1] == 1:
            raise CRDError(
                f"model.path: the pipeline's {kind} is rescaled to zero terminal signal (rescale_betas_zero_snr), where "
                "a noise prediction says nothing of the picture. Set prediction_type to v_prediction if the model is one, "
                "else rescale_betas_zero_snr to false."
            )
        return cls(scheduler, table)

    def sigmas(self, steps: int, shift: float | None) -> Tensor:
        """Noise levels ``(steps + 1,)`` of the scheduler's timesteps, then 0; raises CRDError if a time shift is asked for."""
        if shift is not None:
            raise CRDError(
                f"rollout.shift is {shift:g}, but this model has the noise schedule it was trained with, which knows no "
                "time shift. Leave it out."
            )
        self.scheduler.set_timesteps(steps)
        if isinstance(self.scheduler, DDIMScheduler):
            grid = self.table[self.scheduler.timesteps]
        else:
            grid = sigma_from_ratio(self.scheduler.sigmas[:-1].float())
        return torch.cat([grid, grid.new_zeros(1)])

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """The pipeline's first latent: noise of variance 1 in its coordinates, or in some Euler schedulers a little less."""
        first = sigmas[0].to(noise.device)
        scaled_by_sigma = isinstance(self.scheduler, _EULER) and self.scheduler.config.timestep_spacing != "leading"
        return noise * (first if scaled_by_sigma else vp_norm(first))

    def timesteps(self, sigma: Tensor) -> Tensor:
        """Float32 timesteps ``(b,)`` of noise levels ``(b,)``."""
        if self._placed.device != sigma.device:
            self._placed = self.table.to(sigma.device)
        return timestep_from_sigma(sigma.float(), self._placed)

    def velocity(self, x: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Velocity at ``x`` from what the model predicts there."""
        if self.scheduler.config.prediction_type == "v_prediction":
            return velocity_from_v(x, prediction, sigma)
        return velocity_from_noise(x, prediction, sigma)
