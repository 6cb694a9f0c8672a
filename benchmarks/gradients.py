"""Gradient noise and memory of each method on the embedded model: ``python benchmarks/gradients.py --output FILE.json``.

All methods start from the same weights (a student that lies between two checkpoints of a run would differ by method; here
the student is the base model moved by a fixed random step, old and sampler lie behind it) and draw the same number of pictures
of the same prompts, again and again with other seeds. With gradients g_1 ... g_m of one optimiser step each:

    noise = mean ||g_i - mean g||^2 / ||mean g||^2,   the latter without its bias, ||mean g||^2 - trace of covariance / m

i.e. how many steps would have to be averaged for the noise to be as large as the signal. The reward term alone: no anchor.
"""

import argparse
import gc
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from crd.advantages import normalise
from crd.batch import Samples
from crd.models.load import load_policy
from crd.prompts import load_prompts
from crd.recipe import build_config
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rollout import collect, rollout_sampling
from crd.step import TrainStep
from crd.tiles import StepMembers

METHODS = {
    "crd": {"algorithm": "crd"},
    "crd, averaged levels": {"algorithm": "crd", "objective": {"levels": "average"}},
    "crd, halves": {"algorithm": "crd", "objective": {"levels": "halves"}},
    "nft": {"algorithm": "nft"},
    "awm": {"algorithm": "awm", "awm": {"reference_weight": 0.0}},
    "flow-grpo": {"algorithm": "flow_grpo", "flow_grpo": {"ratio_clip": 0.5}},
    "rwr": {"algorithm": "rwr"},
}
GROUPS, MEMBERS = 4, 12
STEP = 0.02  # of the random move, per LoRA weight


def make_step(settings: dict, policy) -> TrainStep:
    config = build_config(
        {
            "rollout": {"prompts_per_epoch": GROUPS, "group_size": MEMBERS, "steps": 10, "batch_size": 48},
            "noise": {"levels": 4},
            "anchor": {"strength": 0.0},
            "train": {"steps_per_epoch": 1, "micro_batch": 96, "clip_norm": 1e9},
            **settings,
        }
    )
    step = TrainStep(policy, config, Accelerator())
    step.update.apply = lambda norm: norm  # type: ignore[method-assign]
    return step


@torch.no_grad()
def move(policy) -> None:
    rng = torch.Generator().manual_seed(0)
    for _, p in policy.parameters("student"):
        p.add_(STEP * torch.randn(p.shape, generator=rng).to(p))
    policy.blend("sampler", 0.0)
    policy.blend("old", 0.5)


def one_gradient(step: TrainStep, rewards: RewardSet, draw: int) -> tuple[torch.Tensor, int]:
    """The gradient of one optimiser step over a fresh rollout of the same prompts, and the bytes that the rollout holds."""
    config, policy = step.config, step.policy
    groups = load_prompts("nano/text/train").first(GROUPS)
    count = GROUPS * MEMBERS
    group = torch.arange(count) // MEMBERS
    with policy.using("sampler"):
        drawn = collect(
            policy,
            rewards,
            [groups[i] for i in group.tolist()],
            list(range(count)),
            rollout_sampling(config, draw),
        )
    advantage = normalise(torch.from_numpy(drawn.scores.total).float(), group, clip=5.0, spread_of="rollout").value
    samples = Samples(drawn.x0, torch.arange(count), group, group, advantage, drawn.path)
    step(samples, policy.encode([g.text for g in groups]), StepMembers(group, advantage, torch.arange(count)), draw)
    path = drawn.path  # its last point is x0
    held = path.points.nbytes + path.log_density.nbytes if path else drawn.x0.nbytes
    return torch.cat([p.grad.flatten() for p in step.parameters]).double(), held


def measure(settings: dict, policy, rewards: RewardSet, draws: int, title: str) -> dict[str, float | None]:
    step = make_step(settings, policy)
    gradients, held = [], 0
    for draw in tqdm(range(draws), desc=title, unit="step"):
        gradient, held = one_gradient(step, rewards, draw)
        gradients.append(gradient)
    stacked = torch.stack(gradients)
    mean = stacked.mean(0)
    variance = float((stacked - mean).square().sum() / (draws - 1))
    signal = float(mean.square().sum()) - variance / draws
    halves = torch.nn.functional.cosine_similarity(stacked[::2].mean(0), stacked[1::2].mean(0), dim=0)
    return {
        "noise_over_signal": variance / signal if signal > 0 else None,  # none: too few draws to see a signal
        "cosine_of_half_means": float(halves),
        "rollout_bytes_per_picture": held / (GROUPS * MEMBERS),
        "forward_rows_per_step": step.forwards / draws,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--draws", type=int, default=16, help="gradients of each method")
    arguments = parser.parse_args()
    policy = load_policy("nano", build_config({}).model, torch.device("cpu"))
    move(policy)
    rewards = RewardSet([NamedReward("ocr", resolve_reward("ocr", {"detect": False}))])
    results = {}
    for name, settings in METHODS.items():
        results[name] = measure(settings, policy, rewards, arguments.draws, name)
        gc.collect()
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
