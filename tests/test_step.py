"""The gradient of one optimiser step does not depend on tiles; forward passes are counted; collapse is visible."""

import pytest
import torch
from accelerate import Accelerator
from tiny import tiny_config, tiny_pipeline

from crd.batch import Samples
from crd.models.load import load_policy
from crd.step import TrainStep
from crd.tiles import Part, StepMembers, TileSource

SIZES = (4, 4, 3)  # the last group lost a sample


def make_step(tmp_path, dtype=torch.float32, perturbed=True, **sections):
    torch.manual_seed(0)
    sections["rollout"] = {"prompts_per_epoch": 3, "group_size": 4, "steps": 5, **sections.get("rollout", {})}
    config = tiny_config(tmp_path / "run", **sections)
    policy = load_policy(tiny_pipeline().to(dtype), config.model, torch.device("cpu"))
    policy.model.backbone.to(dtype)
    if perturbed:
        rng = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in ("student", "old"):
                for _, p in policy.parameters(name):
                    p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p))
    return TrainStep(policy, config, Accelerator(cpu=True))


def make_batch(step, dtype=torch.float32):
    rng = torch.Generator().manual_seed(2)
    n = sum(SIZES)
    prompt = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    group = prompt if step.config.objective.centering == "prompt" else 0 * prompt
    samples = Samples(
        x0=torch.randn(n, *step.policy.model.latent_shape, generator=rng).to(dtype),
        sample_id=torch.arange(n),
        prompt=prompt,
        group=group,
        advantage=torch.rand(n, generator=rng).to(dtype),
    )
    conditioning = step.policy.encode(["a photo of a ring", "a photo of a red circle", 'a sign that says "STAR"'])
    return samples, conditioning, StepMembers(group, samples.advantage, torch.arange(n))


def gradient(tmp_path, dtype=torch.float32, **sections):
    step = make_step(tmp_path, dtype, **sections)
    step.update.apply = lambda norm: norm
    statistics = step(*make_batch(step, dtype), 0)
    return torch.cat([p.grad.flatten() for p in step.parameters]).double(), statistics, step


OBJECTIVES = [
    {},
    {"weighting": "softmax"},
    {"weighting": "hard", "loss": "cross_entropy"},
    {"levels": "average"},
    {"levels": "halves"},
    {"error": "plain"},
    {"error": "likelihood", "weighting": "softmax", "levels": "average"},
]


@pytest.mark.parametrize(
    ("objective", "micro_batch"), [*((o, m) for o in OBJECTIVES for m in (3, 8)), ({}, 1), ({}, 5), ({}, 12)]
)
def test_any_micro_batch_gives_the_monolithic_gradient(tmp_path, objective, micro_batch):
    """float32 to 1e-5; smaller than a group means two passes, larger one."""
    whole, statistics, step = gradient(tmp_path, objective=objective, train={"micro_batch": 1000})
    assert not step.two_pass
    tiled, other, tiled_step = gradient(tmp_path, objective=objective, train={"micro_batch": micro_batch})
    assert tiled_step.two_pass == (4 * (2 if objective.get("levels") else 1) > micro_batch)
    assert (tiled - whole).norm() <= 1e-5 * whole.norm()
    for key, value in statistics.items():
        assert other[key] == pytest.approx(value, rel=2e-4, abs=1e-7), key


@pytest.mark.parametrize("micro_batch", [4, 12])
def test_centering_over_the_batch_in_one_pass_and_in_two(tmp_path, micro_batch):
    settings = {"centering": "batch", "error": "plain"}
    whole, _, step = gradient(tmp_path, objective=settings, train={"micro_batch": 1000})
    tiled, _, tiled_step = gradient(tmp_path, objective=settings, train={"micro_batch": micro_batch})
    assert not step.two_pass and tiled_step.two_pass == (micro_batch < 12)
    assert (tiled - whole).norm() <= 1e-5 * whole.norm()
    by_prompt, _, _ = gradient(tmp_path, objective={"error": "plain"}, train={"micro_batch": 1000})
    assert (by_prompt - whole).norm() > 0.1 * whole.norm()
    levels = step._sigmas(make_batch(step)[0].group, 0)
    assert (levels == levels[:, :1]).all()  # R of different levels would not compare


@pytest.mark.parametrize("micro_batch", [3, 8])
def test_float64_gradients_agree_to_rounding(tmp_path, micro_batch):
    whole, _, _ = gradient(tmp_path, torch.float64, train={"micro_batch": 1000})
    tiled, _, _ = gradient(tmp_path, torch.float64, train={"micro_batch": micro_batch})
    assert (tiled - whole).norm() <= 1e-9 * whole.norm()


def test_gradient_equals_one_written_out_by_hand(tmp_path):
    """The whole loss, from its definition, with none of the tiling, scaling or objective code."""
    from crd.noise_levels import group_levels
    from crd.seeding import noise

    got, _, step = gradient(tmp_path, train={"micro_batch": 1000, "clip_norm": 1e9}, objective={"error": "plain", "beta": 0.5})
    step.update.clear()
    samples, conditioning, _ = make_batch(step)
    levels = torch.stack([group_levels(step.config.noise, step.grid, seed=0, step=0, group=g) for g in range(3)])
    total = 0.0
    for level in range(2):
        sigma = levels[samples.group, level]
        eps = noise(step.policy.model.latent_shape, 0, 0, f"eps-{level}", list(range(11)))
        s = sigma.reshape(-1, 1, 1, 1)
        x = (1 - s) * samples.x0 + s * eps
        c = conditioning.select(samples.group)
        student = step.policy.velocity(x, sigma, c)
        with torch.no_grad():
            with step.policy.using("old"):
                old = step.policy.velocity(x, sigma, c)
            with step.policy.using("pretrained"):
                empty = step.policy.encode([""] * 11)
                anchor = step.policy.velocity(x, sigma, empty)
                anchor = anchor + 4.5 * (step.policy.velocity(x, sigma, c) - anchor)
        u = eps - samples.x0
        r = ((old - u) ** 2).mean((1, 2, 3)) - ((student - u) ** 2).mean((1, 2, 3))
        strength = 1e-4 + samples.advantage * (0.1 - 1e-4)
        kl = strength * ((student - anchor) ** 2).mean((1, 2, 3))
        for g in range(3):
            mine = samples.group == g
            e = 0.5 * (r[mine] - r[mine].mean()) - (samples.advantage[mine] - samples.advantage[mine].mean())
            total = total + (5.0 / 0.5) * (e**2).sum() / (11 * 2)
        total = total + kl.sum() / (11 * 2)
    total.backward()
    expected = torch.cat([p.grad.flatten() for p in step.parameters]).double()
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def count_forwards(tmp_path, **sections):
    step = make_step(tmp_path, **sections)
    rows = {"student": 0, "old": 0, "pretrained": 0}
    inner = step.policy.model.velocity

    def counting(x, sigma, conditioning):
        rows[step.policy._active] += len(x)
        return inner(x, sigma, conditioning)

    step.policy.model.velocity = counting
    step(*make_batch(step), 0)
    assert step.forwards == sum(rows.values())
    return rows


def test_forward_passes_per_step(tmp_path):
    rows = 11 * 2
    assert count_forwards(tmp_path) == {"student": rows, "old": rows, "pretrained": 2 * rows}
    assert count_forwards(tmp_path, anchor={"guidance_scale": 1.0})["pretrained"] == rows
    assert count_forwards(tmp_path, anchor={"strength": 0.0, "minimum": 0.0}) == {"student": rows, "old": rows, "pretrained": 0}
    assert count_forwards(tmp_path, objective={"policy_weight": 0.0}) == {"student": rows, "old": 0, "pretrained": 2 * rows}
    assert count_forwards(tmp_path, train={"micro_batch": 3}) == {"student": 2 * rows, "old": rows, "pretrained": 2 * rows}


def test_members_of_a_group_share_their_noise_levels_and_steps_differ(tmp_path):
    step = make_step(tmp_path)
    sigma = step._sigmas(torch.tensor([0, 0, 1, 1, 2]), 0)
    assert torch.equal(sigma[:, 0], sigma[:, 1]) and torch.equal(sigma[:, 2], sigma[:, 3])
    others = [step._sigmas(torch.tensor([0]), k)[:, 0] for k in range(8)]
    assert len({tuple(o.tolist()) for o in others}) > 1
    assert all(level in step.grid for o in others for level in o)


def test_continuous_levels_fill_their_strata(tmp_path):
    step = make_step(tmp_path, noise={"source": "continuous", "levels": 4, "minimum": 0.02})
    for k in range(20):
        sigma = step._sigmas(torch.tensor([0]), k)[:, 0]
        assert ((sigma - 0.02) / (0.999 - 0.02) * 4).floor().tolist() == [0, 1, 2, 3]


def test_shared_noise_is_shared_within_a_group_only(tmp_path):
    step = make_step(tmp_path)
    samples, conditioning, _ = make_batch(step)
    source = TileSource(samples, torch.ones(11), conditioning, step._sigmas(samples.group, 0), True, 0, 0)
    eps = source.tile(Part(slice(0, 2), slice(0, 11))).target + samples.x0
    assert torch.allclose(eps[:, 0], eps[:, 3], atol=1e-5)
    assert not torch.allclose(eps[:, 3], eps[:, 4], atol=1e-2) and not torch.allclose(eps[0], eps[1], atol=1e-2)


def test_ratio_signal_collapse(tmp_path):
    """sampler = old = student: R is exactly 0, says nothing of the reward, and only a lagging old mends it."""
    collapsed = make_step(tmp_path, perturbed=False)
    for _, p in collapsed.policy.parameters("student"):
        p.data.add_(0.05)
    collapsed.policy.blend("old", 0.0)
    statistics = collapsed(*make_batch(collapsed), 0)
    assert statistics["implicit_reward_spread"] == 0 and statistics["matching_correlation"] == 0
    lagging = make_step(tmp_path, perturbed=False)
    for _, p in lagging.policy.parameters("student"):
        p.data.add_(0.05)
    statistics = lagging(*make_batch(lagging), 0)
    assert statistics["implicit_reward_spread"] > 1e-4 and statistics["matching_correlation"] != 0


def test_a_non_finite_gradient_changes_nothing(tmp_path):
    step = make_step(tmp_path)
    samples, conditioning, members = make_batch(step)
    samples.x0[0] = float("nan")
    before = [p.detach().clone() for p in step.parameters]
    statistics = step(samples, conditioning, members, 0)
    assert statistics["gradient_norm"] != statistics["gradient_norm"]
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Activations are recomputed in the backward pass, when the scopes of other weights are left: same gradient."""
    plain, _, _ = gradient(tmp_path)
    step = make_step(tmp_path)
    step.policy.model.backbone.enable_gradient_checkpointing()
    step.update.apply = lambda norm: norm
    step(*make_batch(step), 0)
    recomputed = torch.cat([p.grad.flatten() for p in step.parameters]).double()
    assert (recomputed - plain).norm() <= 1e-6 * plain.norm()
