"""Every algorithm on the one loop: the same questions to all, and each objective against its definition in float64."""

import math

import pytest
import torch
from accelerate import Accelerator
from several import on_processes
from tiny import redness, tiny_config, tiny_pipeline
from train_tiny import same, train_tiny

from crd import CRDTrainer
from crd.batch import Path, Samples
from crd.log import read_record
from crd.models.load import load_policy
from crd.objectives import awm, flow_grpo, nft, rwr
from crd.recipe import build_config
from crd.seeding import noise
from crd.solvers import euler, euler_maruyama
from crd.step import TrainStep
from crd.tiles import StepMembers

ALGORITHMS = ("crd", "nft", "awm", "flow_grpo", "rwr")
UNANCHORED = {"strength": 0.0}
SIZES = (4, 4, 3)
GROUP = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
PROMPTS = ["a photo of a ring", "a photo of a red circle", 'a sign that says "STAR"']
TERMS = {"awm": {"ratio_clip": 0.5}, "flow_grpo": {"ratio_clip": 0.5}}


def make_step(tmp_path, algorithm, dtype=torch.float32, **sections):
    torch.manual_seed(0)
    sections = {"anchor": UNANCHORED, **TERMS, "algorithm": algorithm, **sections}
    sections["rollout"] = {"prompts_per_epoch": 3, "group_size": 4, "steps": 5}
    config = tiny_config(tmp_path / "run", **sections)
    policy = load_policy(tiny_pipeline().to(dtype), config.model, torch.device("cpu"))
    policy.model.backbone.to(dtype)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("student", "old", "sampler"):
            for _, p in policy.parameters(name):
                p.add_(0.1 * torch.randn(p.shape, generator=rng).to(p))
    return TrainStep(policy, config, Accelerator(cpu=True))


def make_batch(step, dtype=torch.float32, advantage=None):
    """Three groups with stored paths that the sampler has really taken."""
    rng = torch.Generator().manual_seed(2)
    n = sum(SIZES)
    conditioning = step.policy.encode(PROMPTS)
    here = conditioning.select(GROUP)
    start = torch.randn(n, *step.policy.model.latent_shape, generator=rng).to(dtype)
    added = torch.randn(5, *start.shape, generator=rng).to(dtype)
    with torch.no_grad(), step.policy.using("sampler"):
        path = euler_maruyama(lambda x, s: step.policy.velocity(x, s, here), start, step.points, 0.7, lambda k: added[k])
    if advantage is None:
        advantage = torch.rand(n, generator=rng)
    samples = Samples(path.points[:, -1], torch.arange(n), GROUP, GROUP, advantage.to(dtype), path)
    return samples, conditioning, StepMembers(GROUP, samples.advantage, torch.arange(n))


def gradient(step, batch):
    step.update.apply = lambda norm: norm
    step(*batch, 0)
    return torch.cat([p.grad.flatten() for p in step.parameters]).double()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_reaches_the_student_only(tmp_path, algorithm):
    step = make_step(tmp_path, algorithm, anchor={"strength": 0.1, "guidance_scale": 1.0})
    assert gradient(step, make_batch(step)).norm() > 0
    student = {id(p) for p in step.parameters}
    others = [p for p in step.policy.model.backbone.parameters() if id(p) not in student]
    assert others and all(p.grad is None for p in others)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_spread_in_rewards_gives_no_policy_gradient(tmp_path, algorithm):
    step = make_step(tmp_path, algorithm)
    assert gradient(step, make_batch(step, advantage=torch.full((11,), 0.5))).norm() == 0
    one_group = torch.where(GROUP == 1, torch.rand(11, generator=torch.Generator().manual_seed(5)), torch.tensor(0.5))
    assert gradient(step, make_batch(step, advantage=one_group)).norm() > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_order_within_groups_does_not_matter(tmp_path, algorithm):
    step = make_step(tmp_path, algorithm)
    samples, conditioning, members = make_batch(step)
    expected = gradient(step, (samples, conditioning, members))
    order = torch.tensor([2, 0, 3, 1, 7, 4, 5, 6, 9, 10, 8])
    mixed = samples.select(order)
    got = gradient(step, (mixed, conditioning, StepMembers(GROUP, mixed.advantage, torch.arange(11))))
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("micro_batch", [3, 8])
def test_any_micro_batch_gives_the_same_gradient(tmp_path, algorithm, micro_batch):
    whole = make_step(tmp_path, algorithm, train={"micro_batch": 1000})
    tiled = make_step(tmp_path, algorithm, train={"micro_batch": micro_batch})
    expected, got = gradient(whole, make_batch(whole)), gradient(tiled, make_batch(tiled))
    assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_is_near_float32(tmp_path, algorithm):
    exact = make_step(tmp_path, algorithm)
    samples, conditioning, members = make_batch(exact)
    expected = gradient(exact, (samples, conditioning, members))
    rough = make_step(tmp_path, algorithm, torch.bfloat16)
    assert next(rough.policy.model.backbone.context_embedder.parameters()).dtype == torch.bfloat16
    got = gradient(rough, (samples, conditioning, members))
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()


# ---------------------------------------------------------------------------------- from the definitions


def by_hand(step, batch, algorithm):
    """The loss as the papers write it, sample by sample and level by level, with none of the objective code."""
    samples, conditioning, _ = batch
    policy, total = step.policy, 0.0
    here = conditioning.select(GROUP)
    sigma = step._sigmas(GROUP, 0)
    points = step.points.tolist()
    for level in range(sigma.shape[0]):
        s = sigma[level].reshape(-1, 1, 1, 1)
        eps = noise(policy.model.latent_shape, 0, 0, f"eps-{level}", list(range(11))).double()
        x = (1 - s) * samples.x0 + s * eps
        if algorithm == "flow_grpo":
            index = [points.index(v) for v in sigma[level].tolist()]
            x = torch.stack([samples.path.points[i, k] for i, k in enumerate(index)])
        student = policy.velocity(x, sigma[level], here)
        with torch.no_grad(), policy.using("old"):
            old = policy.velocity(x, sigma[level], here)
        u = eps - samples.x0
        for i in range(11):
            q = float(samples.advantage[i])
            signed = (2 * q - 1) * 5.0
            t = float(sigma[level, i])
            if algorithm == "nft":
                better = 0.8 * student[i] + 0.2 * old[i]
                worse = 1.8 * old[i] - 0.8 * student[i]
                loss = 0.0
                for weight, v in ((q, better), (1 - q, worse)):
                    clean = x[i] - t * v
                    scale = float((clean - samples.x0[i]).abs().mean().detach())
                    loss = loss + weight * ((clean - samples.x0[i]) ** 2).mean() / scale * 5.0 / 0.8
            elif algorithm == "awm":
                ratio = torch.exp(((old[i] - u[i]) ** 2).mean() - ((student[i] - u[i]) ** 2).mean())
                value = float(ratio.detach())
                clipped = min(max(value, 0.9), 1.1)
                inside = clipped == value or value * signed < clipped * signed
                loss = -(ratio if inside else clipped) * signed + 0.3 * ((student[i] - old[i]) ** 2).mean()
            elif algorithm == "rwr":
                mates = [j for j in range(11) if GROUP[j] == GROUP[i]]
                raised = {j: math.exp((2 * float(samples.advantage[j]) - 1) * 5.0 / 2.0) for j in mates}
                loss = len(mates) * raised[i] / sum(raised.values()) * ((student[i] - u[i]) ** 2).mean()
            else:
                k = index[i]
                gap = points[k] - points[k + 1]
                g2 = 0.49 * t / (1 - (points[1] if t == 1 else t))
                score = -(x[i] + (1 - t) * student[i]) / t  # of the noised density: -eps / sigma
                mean = x[i] - gap * (student[i] - g2 / 2 * score)
                normal = torch.distributions.Normal(mean, math.sqrt(g2 * gap))
                density = normal.log_prob(samples.path.points[i, k + 1]).mean()
                ratio = torch.exp(density - float(samples.path.log_density[i, k]))
                value = float(ratio.detach())
                clipped = min(max(value, 0.9), 1.1)
                inside = clipped == value or value * signed < clipped * signed
                loss = -(ratio if inside else clipped) * signed
            total = total + loss / (11 * sigma.shape[0])
    return total


SETTINGS = {
    "nft": {"nft": {"beta": 0.8}},
    "awm": {"awm": {"ratio_clip": 0.1, "reference_weight": 0.3}, "objective": {"error": "plain"}},
    "flow_grpo": {"flow_grpo": {"ratio_clip": 0.1}},
    "rwr": {"rwr": {"temperature": 2.0}, "objective": {"error": "plain"}},
}


@pytest.mark.parametrize("algorithm", SETTINGS)
def test_gradient_equals_the_definition_in_float64(tmp_path, algorithm):
    step = make_step(tmp_path, algorithm, torch.float64, **SETTINGS[algorithm], train={"clip_norm": 1e9})
    batch = make_batch(step, torch.float64)
    got = gradient(step, batch)
    step.update.clear()
    by_hand(step, batch, algorithm).backward()
    expected = torch.cat([p.grad.flatten() for p in step.parameters])
    assert (got - expected).norm() <= 1e-5 * expected.norm()  # timesteps and noise levels are float32


def test_nft_stays_where_rewards_are_at_their_mean_and_moves_with_them_elsewhere():
    """At v = v_old the gradient is proportional to 2q - 1 times that of the flow-matching error."""
    rng = torch.Generator().manual_seed(0)
    old, target = (torch.randn(1, 3, 2, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    sigma = torch.full((1, 3), 0.6, dtype=torch.float64)
    q = torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    v = old.clone().requires_grad_()
    nft.nft_loss(v, old, target, sigma, q, beta=0.5, clip=5.0).sum().backward()
    e = old - target
    direction = 2 * e / 8 * 0.6 / e.abs().mean((2, 3), keepdim=True)
    torch.testing.assert_close(v.grad, 5.0 * (2 * q - 1).reshape(1, 3, 1, 1) * direction)


def test_clipped_loss_has_no_gradient_beyond_its_clip_where_it_would_go_further():
    ratio = torch.tensor([[0.3, 0.3, -0.3, -0.3, 0.01]], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    awm.clipped_policy_loss(ratio, advantage, ratio_clip=0.1).sum().backward()
    assert (ratio.grad != 0).tolist() == [[False, True, True, False, True]]


def test_rwr_weights_have_mean_one_and_follow_the_reward():
    weight = rwr.rwr_weight(torch.tensor([0.0, 1.0, 2.0, -1.0, -1.0]), torch.tensor([0, 0, 0, 1, 1]), 1.0)
    assert weight[:3].mean() == pytest.approx(1) and weight[3:].tolist() == pytest.approx([1, 1])
    assert (weight[1] / weight[0]).item() == pytest.approx(math.e)


# ------------------------------------------------------------------------------- the stochastic sampler


def test_stochastic_sampler_has_the_marginals_of_the_ode():
    """x0 ~ N(mu, 0.5^2) in one dimension: the exact velocity is linear, and both samplers end at that Gaussian."""
    mu, deviation = 0.7, 0.5
    start = torch.randn(40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = torch.linspace(1, 0, 401, dtype=torch.float64)

    def velocity(x, sigma):
        s = sigma[:, None]
        variance = (1 - s) ** 2 * deviation**2 + s**2
        return (s - (1 - s) * deviation**2) / variance * (x - (1 - s) * mu) - mu

    rng = torch.Generator().manual_seed(1)
    path = euler_maruyama(velocity, start, sigmas, 0.7, lambda k: torch.randn(start.shape, generator=rng, dtype=torch.float64))
    for x0 in (euler(velocity, start, sigmas), path.points[:, -1]):
        assert x0.mean().item() == pytest.approx(mu, abs=0.015) and x0.std().item() == pytest.approx(deviation, abs=0.015)
    assert (path.points[:, -1] - euler(velocity, start, sigmas)).std() > 0.3  # another picture than the ODE's
    middle = path.points[:, 200]  # sigma = 0.5
    assert middle.mean().item() == pytest.approx(0.5 * mu, abs=0.015)
    assert middle.std().item() == pytest.approx(math.hypot(0.5 * deviation, 0.5), abs=0.015)


def test_density_and_divergence_equal_those_of_torch():
    rng = torch.Generator().manual_seed(3)
    x, v, w, next_x = (torch.randn(4, 3, generator=rng, dtype=torch.float64) for _ in range(4))
    sigma, next_sigma = torch.full((4,), 0.6, dtype=torch.float64), torch.full((4,), 0.45, dtype=torch.float64)
    spread = torch.full((4,), 0.9, dtype=torch.float64)
    mean, other = (flow_grpo.step_mean(x, u, sigma, next_sigma, spread) for u in (v, w))
    normal, second = (torch.distributions.Normal(m, 0.9 * math.sqrt(0.15)) for m in (mean, other))
    density = flow_grpo.log_density(next_x, mean, sigma, next_sigma, spread)
    torch.testing.assert_close(density, normal.log_prob(next_x).mean(-1))
    factor = flow_grpo.divergence_factor(sigma, next_sigma, spread)
    torch.testing.assert_close(factor * (v - w).square().mean(-1), torch.distributions.kl_divergence(normal, second).mean(-1))


def test_first_ratio_is_one(tmp_path):
    """Recomputed under the weights that drew the path, each step has the density that was stored."""
    step = make_step(tmp_path, "flow_grpo")
    samples, conditioning, members = make_batch(step)
    step.policy.blend("old", 1.0)
    with torch.no_grad():
        for (_, p), (_, q) in zip(step.policy.parameters("student"), step.policy.parameters("sampler"), strict=True):
            p.copy_(q)
    statistics = step(samples, conditioning, members, 0)
    signed = (2 * samples.advantage - 1) * 5
    assert statistics["policy_loss"] == pytest.approx(-float(signed.mean()), abs=1e-4)


# --------------------------------------------------------------------------------------- on the loop


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
def test_two_processes_equal_one(tmp_path, algorithm):
    sections = {
        "algorithm": algorithm,
        "rollout": {"prompts_per_epoch": 3, "group_size": 3},
        "train": {"steps_per_epoch": 1, "epochs": 2},
        "evaluation": {"every": 2, "prompts": 1, "pictures_per_prompt": 1, "before": False},
    }
    on_processes(1, train_tiny, tmp_path / "one", sections)
    on_processes(2, train_tiny, tmp_path / "two", sections)
    same(tmp_path / "one", tmp_path / "two")


#: settings that differ, and the rise to expect in deviations of the first rewards; Flow-GRPO's gradient is the noisier one
LEARNING = {
    "nft": ({}, 1.0),
    "awm": ({}, 1.0),
    "flow_grpo": ({"flow_grpo": {"ratio_clip": 1e-3}, "noise": {"levels": 9}, "anchor": UNANCHORED}, 0.4),
    "rwr": ({}, 1.0),
}


@pytest.mark.parametrize("algorithm", LEARNING)
def test_reward_climbs(tmp_path, algorithm):
    """The embedded model, a dense reward and few epochs, as tests/test_learning.py asks of CRD."""
    sections, rise = LEARNING[algorithm]
    stochastic = algorithm == "flow_grpo"
    config = {
        "output_dir": str(tmp_path / "run"),
        "algorithm": algorithm,
        "rollout": {"prompts_per_epoch": 2, "group_size": 8, "steps": 10 if stochastic else 5, "batch_size": 16},
        "noise": {"levels": 3},
        "anchor": {"strength": 1e-4, "guidance_scale": 1.0, "adaptation": "constant"},
        "sampler": {"delay": 0, "slope": 0.0, "end": 0.0},
        "train": {"epochs": 8, "steps_per_epoch": 1, "learning_rate": 3e-3, "micro_batch": 64},
        "evaluation": {"every": 8, "prompts": 4, "pictures_per_prompt": 4, "steps": 5, "held_out_judges": False},
        **sections,
    }
    CRDTrainer(
        reward_funcs=[redness],
        train_prompts="nano/single_object/train",
        eval_prompts="nano/two_object/heldout",
        config=build_config(config),
    ).train()
    rows = read_record(tmp_path / "run" / "metrics.jsonl")
    evaluations = {row["label"]: row["reward"] for row in rows if row["kind"] == "evaluation"}
    spread = next(r["reward_std"] for r in rows if r["kind"] == "train")
    assert evaluations["epoch-0008"] > evaluations["base"] + rise * spread


def test_paths_are_kept_for_flow_grpo_only(tmp_path):
    step = make_step(tmp_path, "flow_grpo")
    samples, *_ = make_batch(step)
    assert isinstance(samples.path, Path) and samples.path.points.shape[:2] == (11, 6)
    chosen = samples.select(torch.tensor([4, 2]))
    assert torch.equal(chosen.path.points[1], samples.path.points[2])
