"""Speed and memory of SD3.5-Medium's architecture with random weights, in under 10 minutes on one GPU.

    python benchmarks/gpu.py --output gpu.json          # 512x512, rank-32 LoRA, bfloat16
    python benchmarks/gpu.py --tiny                     # the same code on the CPU, with a small model, to see that it runs

Nothing is downloaded: weights are random, prompts are random embeddings. Measured are seconds per rollout picture and per
sample-timestep of training, by rows per pass, with and without gradient checkpointing and compiled blocks, against the speed of
a large bfloat16 matrix product on the same card. One row per pass, eager, is the plain loop to compare with.
"""

import argparse
import json
import statistics
import time
from datetime import date
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from crd.batch import Conditioning, Samples
from crd.config import CRDConfig, ModelConfig
from crd.micro_batch import with_micro_batch
from crd.models.load import compile_blocks, load_policy
from crd.models.policy import Policy
from crd.plan.counts import forwards_per_row
from crd.plan.footprint import footprint
from crd.rollout import draw_latents
from crd.step import TrainStep
from crd.tiles import StepMembers

GROUPS, MEMBERS, LEVELS, STEPS = 2, 24, 4, 10
PROMPTS = ("first", "second", "")
MEDIUM = {  # the published configuration of SD3.5-Medium's transformer
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TINY = MEDIUM | {
    "sample_size": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 32,
    "dual_attention_layers": (0,),
}
VAE = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
TINY_VAE = VAE | {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def random_policy(tiny: bool, device: torch.device) -> Policy:
    """The architecture with random weights; conditioning of the prompts is random and lies in the cache."""
    shape = TINY if tiny else MEDIUM
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**(TINY_VAE if tiny else VAE), **blocks, scaling_factor=1.5305, shift_factor=0.0609)
    with torch.device(device):
        transformer = SD3Transformer2DModel(**shape)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.to(dtype),
        vae=vae.to(dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **{f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")},
    )
    side = 128 if tiny else 512
    policy = load_policy(pipeline, ModelConfig(path="random", height=side, width=side), device)
    rng = torch.Generator().manual_seed(0)
    for prompt in PROMPTS:
        states = torch.randn(1, 77 + 256, shape["joint_attention_dim"], generator=rng)
        pooled = torch.randn(1, shape["pooled_projection_dim"], generator=rng)
        policy._prompts.put(prompt, Conditioning(states.to(device, dtype), pooled.to(device, dtype)))
    return policy


def seconds(work: Any, device: torch.device, repeats: int) -> float:
    """Median time of ``work()``, after one round to warm up."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device) -> float:
    """Operations per second of a large matrix product: what the card reaches, not what its maker states."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, device, 10)


def peak_gib(work: Any, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) / 2**30


def rollout(policy: Policy, pictures: int) -> Any:
    sigmas = policy.model.sigmas(STEPS)
    conditioning = policy.encode(["first"] * pictures)
    start = torch.randn(pictures, *policy.model.latent_shape, device=policy.device)
    return lambda: policy.decode(draw_latents(policy, conditioning, start, sigmas, 1.0))


def training(policy: Policy, rows: int) -> tuple[Any, CRDConfig]:
    """One optimiser step over ``GROUPS * MEMBERS * LEVELS`` sample-timesteps."""
    config = CRDConfig(
        rollout={"prompts_per_epoch": GROUPS, "group_size": MEMBERS, "steps": STEPS},
        noise={"levels": LEVELS},
        train={"steps_per_epoch": 1},
    )
    config = with_micro_batch(config, rows)
    step = TrainStep(policy, config, Accelerator())
    count = GROUPS * MEMBERS
    group = torch.arange(GROUPS).repeat_interleave(MEMBERS)
    x0 = torch.randn(count, *policy.model.latent_shape, device=policy.device)
    samples = Samples(x0, torch.arange(count), group, group, torch.linspace(0, 1, count))
    conditioning = policy.encode(PROMPTS[:GROUPS])
    members = StepMembers(group, samples.advantage, torch.arange(count))
    return lambda: step(samples, conditioning, members, 0), config


def measure(policy: Policy, row_flops: float, peak: float) -> list[dict[str, Any]]:
    """Every size, eager; then the best one compiled."""
    device, results = policy.device, []
    total = GROUPS * MEMBERS * LEVELS

    def add(name: str, rows: int, work: Any, per: int, flops: float) -> None:
        try:
            spent = seconds(work, device, 1 if rows == 1 else 3)
            row = {"what": name, "rows": rows, "seconds_each": spent / per, "share_of_peak": flops / spent / peak}
            results.append(row | {"peak_GiB": peak_gib(work, device)})
        except torch.cuda.OutOfMemoryError:
            results.append({"what": name, "rows": rows, "out_of_memory": True})
        policy.model.pipeline.transformer.zero_grad(set_to_none=True)
        print(json.dumps(results[-1]), flush=True)

    sizes = (1, 4, 8, 16, 24, 48) if device.type == "cuda" else (1, 24)
    for pictures in (8, 24) if device.type == "cuda" else (4,):
        add("rollout, per picture", pictures, rollout(policy, pictures), pictures, pictures * STEPS * row_flops)
    for checkpointing in (False, True):
        if checkpointing:
            policy.model.backbone.enable_gradient_checkpointing()
        for rows in sizes:
            work, config = training(policy, rows)
            passes = forwards_per_row(config) + checkpointing
            name = "training, per sample-timestep" + (", checkpointed" if checkpointing else "")
            add(name, rows, work, total, total * passes * row_flops)
    policy.model.backbone.disable_gradient_checkpointing()
    if device.type == "cuda":
        compile_blocks(policy)
        for rows in (8, 24):
            work, config = training(policy, rows)
            add("training, per sample-timestep, compiled", rows, work, total, total * forwards_per_row(config) * row_flops)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that the script runs")
    arguments = parser.parse_args()
    device = Accelerator().device
    policy = random_policy(arguments.tiny, device)
    counted, peak = footprint(policy), peak_flops(device)
    facts = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "parameters": counted.backbone_parameters,
        "row_GFLOP": counted.row_flops / 1e9,
        "peak_TFLOPS": peak / 1e12,
    }
    print(json.dumps(facts), flush=True)
    facts["measured"] = measure(policy, counted.row_flops, peak)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(facts, file, indent=1)


if __name__ == "__main__":
    main()
