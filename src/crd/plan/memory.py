"""Whether a run fits onto a GPU: bytes by part and phase, the rows that fit, and which setting to change."""

from dataclasses import dataclass

from crd.config import CRDConfig
from crd.micro_batch import largest_fitting, rows_per_step
from crd.plan.footprint import Footprint
from crd.plan.gpus import GPU

GIB = 2**30
OVERHEAD = 1.5 * GIB  # the driver's context, kernels' workspaces, the allocator's rounding
SLACK = 1.3  # on whatever grows with the rows: fragments, casts, norms in float32 (on the CPU, where it is counted, bfloat16)
TRAINED = {"lora": "LoRA, its optimiser", "full": "three copies in float32, optimiser"}


@dataclass(frozen=True)
class Memory:
    """Memory of one process on one GPU, in bytes."""

    counted: Footprint
    config: CRDConfig
    gpu: GPU
    distinct_prompts: int

    @property
    def fixed(self) -> float:
        """What is always there."""
        idle = 0 if self.config.model.idle_on_host else self.counted.encoder_bytes + self.counted.vae_bytes
        return self.counted.backbone_bytes + self.counted.trained_bytes + idle + self.prompts + self.paths + OVERHEAD

    @property
    def prompts(self) -> float:
        """Prompt embeddings on the device."""
        return min(self.config.model.prompt_cache_MiB * 2**20, self.distinct_prompts * self.counted.prompt_bytes)

    @property
    def paths(self) -> float:
        """All points on the way of an epoch's pictures, which only Flow-GRPO stores."""
        if self.config.algorithm != "flow_grpo":
            return 0.0
        rollout = self.config.rollout
        return float(rollout.prompts_per_epoch * rollout.group_size * (rollout.steps + 1) * self.counted.latent_bytes)

    @property
    def visiting(self) -> dict[str, float]:
        """What comes and goes, by phase, besides training."""
        away = self.config.model.idle_on_host
        batch = self.config.rollout.batch_size
        return {
            "encoding prompts": float(self.counted.encoder_bytes if away else 0),
            "drawing": SLACK * batch * self.counted.transient_bytes,
            "decoding": (self.counted.vae_bytes if away else 0) + SLACK * batch * self.counted.decode_bytes,
            **({"joining the paths": self.paths} if self.paths else {}),  # those of batches, to those of the epoch
        }

    def training(self, rows: int, checkpointing: bool) -> float:
        """Activations of one forward and backward pass, and the paths of the step's own pictures."""
        counted = self.counted
        row, once = (counted.checkpointed_row_bytes, 0) if checkpointing else (counted.row_bytes, counted.pass_bytes)
        return once + SLACK * rows * (row + counted.transient_bytes) + self.paths / self.config.train.steps_per_epoch

    def fits(self, rows: int, checkpointing: bool) -> bool:
        return self.fixed + self.training(rows, checkpointing) <= self.gpu.memory_gib * GIB

    @property
    def rows(self) -> int:
        """Sample-timesteps per forward pass: the recipe's, or as many as fit (at least one)."""
        train = self.config.train
        return train.micro_batch or largest_fitting(
            lambda rows: self.fits(rows, train.gradient_checkpointing), rows_per_step(self.config)
        )

    def lines(self) -> list[str]:
        """The table, the verdict, and what to change."""
        checkpointing = self.config.train.gradient_checkpointing
        training = self.training(self.rows, checkpointing)
        parts = {
            "backbone": self.counted.backbone_bytes,
            TRAINED[self.config.model.tuning]: self.counted.trained_bytes,
            "prompt embeddings": self.prompts,
            "driver, workspaces": OVERHEAD,
        }
        if self.paths:
            parts["paths of the rollout"] = self.paths
        if not self.config.model.idle_on_host:
            parts |= {"text encoders": self.counted.encoder_bytes, "VAE": self.counted.vae_bytes}
        phases = {**self.visiting, f"training {self.rows} rows": training}
        table = [f"  memory always          {size / GIB:7.2f} GiB  {name}" for name, size in parts.items()]
        table += [f"  memory at times        {size / GIB:7.2f} GiB  {name}" for name, size in phases.items()]
        peak = self.fixed + max(phases.values())
        verdict = "fits" if peak <= self.gpu.memory_gib * GIB else "DOES NOT FIT"
        table.append(f"  memory at the peak     {peak / GIB:7.2f} GiB of {self.gpu.memory_gib:g}: {verdict}")
        return table + [f"  change                 {advice}" for advice in self.advice()]

    def advice(self) -> list[str]:
        """Settings that would make it fit, the cheapest first; empty if it does."""
        limit, checkpointing = self.gpu.memory_gib * GIB, self.config.train.gradient_checkpointing
        found = []
        if self.fixed + self.training(1, True) > limit:
            if not self.config.model.idle_on_host:
                found.append("model.idle_on_host=true: text encoders and VAE leave the GPU")
            if self.config.model.tuning == "full":
                return [
                    *found,
                    "model.tuning=lora, or several GPUs with FSDP2: each keeps a part of all weights (docs/machines.md)",
                ]
            if not self.config.model.int8:
                found.append("model.int8=true: halves the backbone")
            return [*found, "several GPUs with FSDP2: each keeps a part of the backbone (docs/machines.md)"]
        if not self.fits(self.rows, checkpointing):
            most = largest_fitting(lambda rows: self.fits(rows, checkpointing), self.rows)
            if self.fits(most, checkpointing):
                found.append(f"train.micro_batch={most} (same result, more passes)")
            elif not checkpointing:
                found.append("train.gradient_checkpointing=true: a third more time in training")
        for phase, size in self.visiting.items():
            if self.fixed + size > limit and phase in ("drawing", "decoding"):
                room = int(self.config.rollout.batch_size * (limit - self.fixed) / size)
                found.append(f"rollout.batch_size={max(1, room)}: {phase} takes less")
        if self.paths and self.fixed + self.paths > limit:
            found.append("several GPUs: each keeps the paths of its own pictures only")
        if self.fixed + self.visiting["encoding prompts"] > limit:
            found.append("a text encoder is too large: load the pipeline without it (SD3: text_encoder_3), or use a larger GPU")
        return found
