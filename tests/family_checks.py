"""What is proved of every family of models, on a tiny random pipeline of the real classes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import redness, tiny_config
from torch import Tensor

from crd import CRDTrainer
from crd.config import ModelConfig
from crd.models.load import load_policy
from crd.models.policy import Policy
from crd.rollout import draw_latents

PROMPTS = ["a photo of a red circle", 'a sign that says "STAR"', "a ring"]  # of different lengths
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A pipeline, and how its own ``__call__`` is asked for what we ask of the policy."""

    make: Callable[[], DiffusionPipeline]
    settings: ModelConfig  # not square, so that a transposition shows
    guidance: Callable[[float], dict[str, Any]]  # scale to arguments
    latents: Callable[[Any, Tensor], Tensor] = lambda family, x: x  # our starting latents, in the shape the pipeline takes

    def policy(self, pipeline: DiffusionPipeline | None = None) -> Policy:
        torch.manual_seed(0)
        return load_policy(pipeline or self.make(), self.settings, torch.device("cpu"))

    def own(self, pipeline: DiffusionPipeline, family: Any, start: Tensor, scale: float) -> tuple[Tensor, list[Image.Image]]:
        """The pipeline's latents after the last step, and its pictures."""
        last = {}

        def keep(pipeline, step, timestep, tensors):
            last.update(tensors)
            return {}

        length = {"max_sequence_length": self.settings.max_sequence_length} if self.settings.max_sequence_length else {}
        pipeline.set_progress_bar_config(disable=True)
        pictures = pipeline(
            prompt=list(PROMPTS),  # a copy: some pipelines write into it
            latents=self.latents(family, start.clone()),
            height=self.settings.height,
            width=self.settings.width,
            num_inference_steps=STEPS,
            callback_on_step_end=keep,
            **length,
            **self.guidance(scale),
        ).images
        return last["latents"], pictures


def noise(policy: Policy) -> Tensor:
    return torch.randn(len(PROMPTS), *policy.model.latent_shape, generator=torch.Generator().manual_seed(5))


def levels() -> Tensor:
    return torch.tensor([0.9, 0.5, 0.2])


@torch.no_grad()
def perturb(policy: Policy) -> None:
    rng = torch.Generator().manual_seed(1)
    for _, parameter in policy.parameters("student"):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))


def farthest(a: list[Image.Image], b: list[Image.Image]) -> int:
    """Largest difference of two lists of pictures, in steps of 1/255."""
    assert [x.size for x in a] == [x.size for x in b] and len(a) == len(PROMPTS)
    return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p.tobytes(), q.tobytes(), strict=True))


def check_rollout(case: Case, scale: float) -> Tensor:
    """The pretrained model's rollout is the pipeline's own, though the student's weights are away from zero."""
    policy = case.policy()
    perturb(policy)
    start = noise(policy)
    with policy.using("pretrained"):
        ours = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(STEPS), scale)
        theirs, pictures = case.own(policy.model.pipeline, policy.model, start, scale)
    assert ours.dtype == torch.float32 and (ours - start).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert farthest(policy.model.decode(ours), pictures) <= 1
    return ours


def check_training(case: Case, folder: Any, scale: float) -> None:
    """Two optimiser steps of CRD: nothing of the pipeline changes but LoRA weights, and those of every target do."""
    pipeline = case.make()
    before = {name: tensor.clone() for name, tensor in _weights(pipeline).items()}
    config = tiny_config(
        folder,
        model={k: getattr(case.settings, k) for k in ("height", "width", "max_sequence_length")},
        rollout={"group_size": 2, "steps": 2},
        train={"epochs": 1, "steps_per_epoch": 2, "gradient_checkpointing": True},
        anchor={"guidance_scale": scale},
        evaluation={"before": False, "prompts": 1, "steps": 2},
    )
    trainer = CRDTrainer(model=pipeline, reward_funcs=[redness], config=config)
    start = {name: parameter.detach().clone() for name, parameter in trainer.policy.parameters("student")}
    trainer.train()
    assert trainer.steps_done == 2
    after = _weights(pipeline)
    assert before and all(torch.equal(after[_wrapped(name, after)], tensor) for name, tensor in before.items())
    changed = [name for name, parameter in trainer.policy.parameters("student") if not torch.equal(parameter, start[name])]
    for target in trainer.policy.model.lora_targets:
        assert any(f"{target}.lora_B" in name for name in changed), target


def _weights(pipeline: DiffusionPipeline) -> dict[str, Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def _wrapped(name: str, after: dict[str, Tensor]) -> str:
    """The name that a weight has once LoRA wraps its layer."""
    layer, _, leaf = name.rpartition(".")
    return name if name in after else f"{layer}.base_layer.{leaf}"


def check_export(case: Case, folder: Any, scale: float) -> None:
    """The LoRA file gives our pictures in plain diffusers."""
    policy = case.policy()
    perturb(policy)
    policy.save(folder)
    plain = case.make()
    plain.load_lora_weights(str(folder))
    start = noise(policy)
    theirs, pictures = case.own(plain, policy.model, start, scale)
    ours = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(STEPS), scale)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert farthest(policy.model.decode(ours), pictures) <= 1
    with policy.using("pretrained"):
        without = draw_latents(policy, policy.encode(PROMPTS), start, policy.model.sigmas(STEPS), scale)
    assert (ours - without).abs().max() > 1e-2


@torch.no_grad()
def check_rows_are_independent(case: Case) -> None:
    """A batch equals its rows by themselves, also where a shorter prompt is padded; and prompts matter."""
    policy = case.policy()
    x = noise(policy)
    together = policy.velocity(x, levels(), policy.encode(PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        single = policy.velocity(x[i : i + 1], levels()[i : i + 1], policy.model.encode([prompt]))
        torch.testing.assert_close(single, together[i : i + 1], rtol=0, atol=1e-5)
    same = policy.velocity(x[:1].expand_as(x), levels()[:1].expand(len(x)), policy.encode(PROMPTS))
    assert min((same[i] - same[j]).abs().max() for i in range(len(x)) for j in range(i)) > 1e-3


def check_gradient_checkpointing(case: Case) -> None:
    """Recomputed activations give the same gradients."""

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        policy = case.policy()
        perturb(policy)
        if checkpointing:
            policy.model.backbone.enable_gradient_checkpointing()
        policy.velocity(noise(policy), levels(), policy.encode(PROMPTS)).square().mean().backward()
        return {name: parameter.grad for name, parameter in policy.parameters("student") if parameter.grad is not None}

    plain, recomputed = gradients(False), gradients(True)
    assert plain and plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-7)


def check_bfloat16(case: Case) -> None:
    """Weights of the pipeline in bfloat16 under autocast; LoRA weights, velocities and latents in float32."""
    reference = case.policy()
    x = noise(reference)
    with torch.no_grad():
        expected = reference.velocity(x, levels(), reference.encode(PROMPTS))
    policy = case.policy(case.make().to(torch.bfloat16))
    assert policy.model.backbone.dtype == torch.bfloat16
    velocity = policy.velocity(x, levels(), policy.encode(PROMPTS))
    assert velocity.dtype == torch.float32 and velocity.requires_grad
    velocity.square().mean().backward()
    assert (velocity - expected).abs().max() < 0.1 * expected.abs().max()
    latents = draw_latents(policy, policy.encode(PROMPTS), x, policy.model.sigmas(2), 1.0)
    assert latents.dtype == torch.float32 and len(policy.model.decode(latents)) == len(PROMPTS)


@torch.no_grad()
def check_folder(case: Case, folder: Any) -> None:
    """A saved pipeline is opened by its path and draws the same velocities."""
    pipeline = case.make()
    pipeline.save_pretrained(folder)
    loaded = load_policy(str(folder), case.settings, torch.device("cpu"))
    policy = case.policy(pipeline)
    assert type(loaded.model) is type(policy.model)
    got, expected = (p.velocity(noise(p), levels(), p.encode(PROMPTS)) for p in (loaded, policy))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def naive_tokens(grid: Tensor) -> Tensor:
    """VAE latents ``(n, c, rows, columns)`` to tokens of 2x2 pixels, entry by entry: channel, row and column within it."""
    n, channels, rows, columns = grid.shape
    tokens = torch.zeros(n, rows * columns // 4, channels * 4)
    for c in range(channels):
        for y in range(rows):
            for x in range(columns):
                tokens[:, (y // 2) * (columns // 2) + x // 2, c * 4 + (y % 2) * 2 + x % 2] = grid[:, c, y, x]
    return tokens
