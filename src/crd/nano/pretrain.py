"""Flow-matching pretraining of the nano transformer with its text encoders, on latents encoded once."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crd.flow import TIMESTEPS, interpolate, velocity_target
from crd.nano.base import NanoParts
from crd.nano.settings import BuildConfig
from crd.nano.state import load_optimizer, save_optimizer
from crd.nano.world import COLORS, COUNT_WORDS, SHAPES, plural
from crd.seeding import generator

CAPTION_DROPOUT = 0.1  # share of captions replaced by the empty one, so that guidance works
EMA_DECAY = 0.999
#: (zero tokens in the place of T5's, probability): a plain pipe(prompt) adds 256, our recipes 1
ZERO_TOKENS = ((1, 0.93), (16, 0.04), (256, 0.03))


@dataclass(frozen=True)
class Bank:
    """Latents with their captions' tokens: ``latents (N, 16, 8, 8)``, ``tokens (N, L)``, ``empty (L,)``."""

    latents: Tensor
    tokens: Tensor
    empty: Tensor
    signs: Tensor  # rows that are signs
    shapes: Tensor  # rows that are shapes


@dataclass(frozen=True)
class CaptionNoise:
    """Captions of the web are often wrong, which is why a model without guidance follows its prompt badly.

    So are these: each letter, colour, shape, number and direction of a caption is replaced, with some
    probability, by a random one of its kind. Guidance undoes most of it; that gap is what RL fills.
    """

    kind: Tensor  # (vocabulary,) index of the token's kind, 0 for tokens that stay
    rate: Tensor  # (kinds,) probability of a replacement
    members: tuple[Tensor, ...]  # tokens of each kind

    @classmethod
    def make(cls, vocabulary: dict[str, int], kinds: list[tuple[float, list[str]]]) -> "CaptionNoise":
        members = tuple(torch.tensor([vocabulary[word] for word in words]) for _, words in kinds)
        kind = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
        for index, tokens in enumerate(members, 1):
            kind[tokens] = index
        return cls(kind, torch.tensor([0.0, *(rate for rate, _ in kinds)]), members)

    def __call__(self, tokens: Tensor, rng: torch.Generator) -> Tensor:
        kind = self.kind[tokens]
        replaced = torch.rand(tokens.shape, generator=rng) < self.rate[kind]
        pick = torch.rand(tokens.shape, generator=rng)
        for index, members in enumerate(self.members, 1):
            random_member = members[(pick * len(members)).long()]
            tokens = torch.where(replaced & (kind == index), random_member, tokens)
        return tokens


def caption_noise(parts: NanoParts, config: BuildConfig) -> CaptionNoise:
    letters = [chr(ord("A") + i) for i in range(26)]
    groups = [list(SHAPES), [plural(s) for s in SHAPES], list(COLORS), list(COUNT_WORDS.values()), ["left", "right"]]
    words = [(config.word_noise, group) for group in [*groups, ["above", "below"]]]
    return CaptionNoise.make(parts.tokenizer.get_vocab(), [(config.letter_noise, letters), *words])


def encode_text(parts: NanoParts, tokens: Tensor, zero_tokens: int) -> tuple[Tensor, Tensor]:
    """As ``StableDiffusion3Pipeline.encode_prompt`` without T5: states ``(B, L + zeros, D)`` and pooled ``(B, D)``."""
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in (parts.text_encoder, parts.text_encoder_2)]
    states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    zeros = states.new_zeros(len(tokens), zero_tokens, states.shape[-1])
    return torch.cat([states, zeros], 1), torch.cat([output.text_embeds for output in outputs], -1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Short warm-up, constant, and a linear fall to zero over the last third."""
    return peak * min(1.0, (step + 1) / 200, 3 * (steps - step) / steps)


def _optimizers(modules: torch.nn.Module, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer blocks, AdamW for all else."""
    matrices = [p for name, p in modules.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    others = [p for name, p in modules.named_parameters() if not (p.ndim == 2 and "transformer_blocks" in name)]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def _rows(bank: Bank, config: BuildConfig, step: int, rng: torch.Generator) -> Tensor:
    """Rows of the bank for one step: any, or a fixed share of signs once captions are noisy."""
    if step < config.clean_steps:
        return torch.randint(len(bank.latents), (config.batch,), generator=rng)
    signs = round(config.noisy_text_share * config.batch)
    counts = ((bank.signs, signs), (bank.shapes, config.batch - signs))
    return torch.cat([rows[torch.randint(len(rows), (count,), generator=rng)] for rows, count in counts])


def _draw(bank: Bank, corrupt: CaptionNoise, config: BuildConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """x0, noise, sigma (logit-normal), tokens with dropout, and the number of zero tokens, for one step."""
    rng = generator(config.seed, step, "pretrain")
    index = _rows(bank, config, step, rng)
    x0, tokens = bank.latents[index], bank.tokens[index]
    if step >= config.clean_steps:
        tokens = corrupt(tokens, rng)
    eps = torch.randn(x0.shape, generator=rng)
    sigma = torch.sigmoid(torch.randn(config.batch, generator=rng))
    dropped = torch.rand(config.batch, generator=rng) < CAPTION_DROPOUT
    tokens = torch.where(dropped[:, None], bank.empty, tokens)
    choice = torch.multinomial(torch.tensor([p for _, p in ZERO_TOKENS]), 1, generator=rng).item()
    return x0, eps, sigma, tokens, ZERO_TOKENS[int(choice)][0]


def flow_matching_loss(parts: NanoParts, x0: Tensor, eps: Tensor, sigma: Tensor, tokens: Tensor, zeros: int) -> Tensor:
    """Mean squared error of the velocity, through the text encoders."""
    states, pooled = encode_text(parts, tokens, zeros)
    predicted = parts.transformer(
        hidden_states=interpolate(x0, eps, sigma),
        timestep=TIMESTEPS * sigma,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return (predicted - velocity_target(x0, eps)).square().mean()


def train_transformer(
    parts: NanoParts, bank: Bank, folder: Path, config: BuildConfig, report: Callable[[str], None]
) -> NanoParts:
    """Trains in place and returns the exponential moving average; restarts from ``folder``."""
    modules, average = parts.modules(), copy.deepcopy(parts.modules()).requires_grad_(False)
    optimizers = _optimizers(modules, config.learning_rate)
    corrupt = caption_noise(parts, config)
    compiled = torch.compile(flow_matching_loss, dynamic=False) if config.compile else flow_matching_loss
    start = 0
    if (folder / "model.safetensors").exists():
        modules.load_state_dict(load_file(folder / "model.safetensors"))
        average.load_state_dict(load_file(folder / "average.safetensors"))
        for i, optimizer in enumerate(optimizers):
            start = load_optimizer(optimizer, folder / f"optimizer_{i}.safetensors")
    began, recent = time.monotonic(), []
    for step in range(start, config.steps):
        x0, eps, sigma, tokens, zeros = _draw(bank, corrupt, config, step)
        # the rare lengths are not worth a compilation of their own
        loss = (compiled if zeros == ZERO_TOKENS[0][0] else flow_matching_loss)(parts, x0, eps, sigma, tokens, zeros)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
        recent.append(loss.detach())
        done = step + 1
        if done % 100 == 0 or done == config.steps:
            left = (time.monotonic() - began) / (done - start) * (config.steps - done)
            mean = torch.stack(recent[-100:]).mean()
            report(f"transformer {done}/{config.steps}  loss {mean:.4f}  {left / 60:.1f} min left")
        if done % config.save_every == 0 or done == config.steps:
            save_file(modules.state_dict(), folder / "model.safetensors")
            save_file(average.state_dict(), folder / "average.safetensors")
            for i, optimizer in enumerate(optimizers):
                save_optimizer(optimizer, done, folder / f"optimizer_{i}.safetensors")
    modules.load_state_dict(average.state_dict())
    return parts
