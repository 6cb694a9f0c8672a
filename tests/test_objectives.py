"""Centering, the CRD loss, the anchor: against naive float64 loops and the invariances of theory, section 4."""

import math

import pytest
import torch

from crd.config import NoiseConfig
from crd.noise_levels import group_levels
from crd.objectives import crd, terms

SETTINGS = {"beta": 0.7, "clip": 5.0, "levels": "each", "baseline_gradient": True}


def draw(sizes=(4, 6, 3), levels=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    r = torch.randn(levels, n, generator=rng, dtype=torch.float64)
    a = torch.rand(n, generator=rng, dtype=torch.float64)
    return r, a, group


def loss(r, a, group, form="squared", weighting="uniform", temperature=0.2, **settings):
    return crd.policy_loss(r, a, group, form=form, weighting=weighting, temperature=temperature, **{**SETTINGS, **settings})


def naive(r, a, group, form, weighting, temperature=0.2, beta=0.7, clip=5.0):
    """The loss written out sample by sample with Python floats."""
    out = [[0.0] * len(a) for _ in r]
    for g in set(group.tolist()):
        members = [i for i in range(len(a)) if group[i] == g]
        values = [float(a[i]) for i in members]
        mean = sum(values) / len(values)
        if weighting == "uniform":
            directions = [[1 / len(members)] * len(members)]
        elif weighting == "softmax":
            directions = []
            for tau in (temperature, -temperature):
                raised = [math.exp(v / tau) for v in values]
                directions.append([x / sum(raised) for x in raised])
        else:
            directions = []
            for sign in (1, -1):
                half = [1.0 if sign * (v - mean) > 0 else 0.0 for v in values]
                directions.append([h / sum(half) for h in half])
        for level in range(len(r)):
            for w in directions:
                r_mean = sum(wj * float(r[level, j]) for wj, j in zip(w, members, strict=True))
                a_mean = sum(wj * v for wj, v in zip(w, values, strict=True))
                for i in members:
                    left, right = beta * (float(r[level, i]) - r_mean), float(a[i]) - a_mean
                    if form == "squared":
                        value = (left - right) ** 2
                    else:
                        p = 1 / (1 + math.exp(-right))
                        value = -p * math.log(1 / (1 + math.exp(-left))) - (1 - p) * math.log(1 - 1 / (1 + math.exp(-left)))
                    out[level][i] += clip / beta * value / len(directions)
    return torch.tensor(out, dtype=torch.float64)


FORMS = [(f, w) for f in ("squared", "cross_entropy") for w in ("uniform", "softmax", "hard")]


@pytest.mark.parametrize(("form", "weighting"), FORMS)
def test_loss_equals_the_naive_loop(form, weighting):
    r, a, group = draw()
    torch.testing.assert_close(loss(r, a, group, form, weighting), naive(r, a, group, form, weighting), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("form", "weighting"), FORMS)
def test_a_constant_per_prompt_changes_nothing(form, weighting):
    r, a, group = draw()
    shift = torch.tensor([3.0, -2.0, 0.7], dtype=torch.float64)[group]
    expected = loss(r, a, group, form, weighting)
    torch.testing.assert_close(loss(r + shift, a, group, form, weighting), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss(r, a + shift, group, form, weighting), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("form", "weighting"), FORMS)
def test_groups_together_equal_groups_apart_in_any_order(form, weighting):
    r, a, group = draw()
    whole = loss(r, a, group, form, weighting)
    for g in range(3):
        mine = group == g
        alone = loss(r[:, mine], a[mine], torch.zeros(int(mine.sum()), dtype=torch.long), form, weighting)
        torch.testing.assert_close(alone, whole[:, mine], rtol=1e-12, atol=1e-12)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(3))
    permuted = loss(r[:, order], a[order], group[order], form, weighting)
    torch.testing.assert_close(permuted, whole[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("form", "weighting"), FORMS)
def test_a_group_of_equal_rewards_has_no_policy_gradient(form, weighting):
    r, a, group = draw()
    a[group == 1] = 0.3
    r.requires_grad_(True)
    loss(r, a, group, form, weighting).sum().backward()
    assert r.grad[:, group == 1].abs().max() == 0
    assert r.grad[:, group != 1].abs().min() > 0


def test_gradient_through_the_uniform_mean_vanishes_but_not_through_others():
    r, a, group = draw()

    def gradient(weighting, baseline_gradient):
        leaf = r.clone().requires_grad_(True)
        loss(leaf, a, group, weighting=weighting, baseline_gradient=baseline_gradient).sum().backward()
        return leaf.grad

    torch.testing.assert_close(gradient("uniform", True), gradient("uniform", False), rtol=0, atol=1e-13)
    for weighting in ("softmax", "hard"):
        assert (gradient(weighting, True) - gradient(weighting, False)).abs().max() > 1e-2


def test_uniform_gradient_is_that_of_a_weighted_flow_matching_loss():
    """dL/dR_i = 2 clip e_i for the summed loss (theory, section 4)."""
    r, a, group = draw()
    r.requires_grad_(True)
    loss(r, a, group).sum().backward()
    e = SETTINGS["beta"] * terms.center(r, group) - terms.center(a, group)
    torch.testing.assert_close(r.grad, 2 * SETTINGS["clip"] * e.detach(), rtol=1e-12, atol=1e-12)


def test_averaging_levels_squares_the_mean():
    r, a, group = draw()
    averaged = loss(r, a, group, levels="average")
    torch.testing.assert_close(averaged, loss(r.mean(0, keepdim=True), a, group), rtol=0, atol=0)
    assert averaged.shape == (1, 13)


def test_error_forms_against_numpy():
    rng = torch.Generator().manual_seed(0)
    v, u = (torch.randn(2, 3, 4, 2, 2, generator=rng) for _ in range(2))
    sigma = torch.rand(2, 3, generator=rng) * 0.8 + 0.1
    d = (v - u).double().numpy().reshape(2, 3, 16)
    s = sigma.double().numpy()
    expected = {
        "plain": (d**2).mean(-1),
        "adaptive": (d**2).mean(-1) / abs(d).mean(-1),
        "likelihood": (d**2).sum(-1) * (1 - s) / s,
    }
    for form, values in expected.items():
        got = terms.prediction_error(v, u, sigma, form).double().numpy()
        assert abs(got - values).max() < 1e-4 * abs(values).max()
    assert terms.prediction_error(u, u, sigma, "adaptive").abs().max() == 0  # the floor keeps 0/0 away


def test_adaptive_divisor_has_no_gradient():
    v = torch.randn(1, 2, 8, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    u, sigma = torch.zeros(1, 2, 8), torch.full((1, 2), 0.5)
    terms.prediction_error(v, u, sigma, "adaptive").sum().backward()
    expected = 2 * v.detach() / 8 / v.detach().abs().mean(-1, keepdim=True)
    torch.testing.assert_close(v.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["adaptive", "constant", "reversed"])
def test_anchor_strength_against_the_formula(form):
    q = torch.tensor([0.0, 0.25, 1.0])
    strength = terms.anchor_strength(q, strength=0.1, minimum=1e-4, form=form)
    expected = {
        "adaptive": [1e-4, 1e-4 + 0.25 * 0.0999, 0.1],
        "constant": [0.1] * 3,
        "reversed": [0.1, 1e-4 + 0.75 * 0.0999, 1e-4],
    }
    torch.testing.assert_close(strength, torch.tensor(expected[form]))


@pytest.mark.parametrize("dimensions", [1, 3])
def test_likelihood_weighting_gives_the_log_ratio_of_gaussians(dimensions):
    """The integral over sigma of the weighted error difference is log p/p_ref for exact velocities (theory, section 3).

    x0 ~ N(m, s^2): the optimal velocity is E[eps - x0 | x], linear in x. The expectation over eps is taken
    in closed form, the integral over sigma by quadrature, so nothing here is random.
    """
    x0 = torch.tensor([0.3, -1.1, 0.8], dtype=torch.float64)[:dimensions]
    nodes = (torch.arange(40000, dtype=torch.float64) + 0.5) / 40000
    # Gauss-Hermite nodes for the expectation over eps, one dimension at a time (velocities act per dimension)
    import numpy as np

    e, w = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(7))
    w = w / w.sum()

    def optimal_velocity(x, sigma, mean, spread):
        var = (1 - sigma) ** 2 * spread**2 + sigma**2
        x0_hat = mean + (1 - sigma) * spread**2 / var * (x - (1 - sigma) * mean)
        eps_hat = sigma / var * (x - (1 - sigma) * mean)
        return eps_hat - x0_hat

    def expected_error(mean, spread):
        total = 0.0
        for value in x0.tolist():
            for noise, weight in zip(e, w, strict=True):
                x = (1 - nodes) * value + nodes * noise
                v = optimal_velocity(x, nodes, mean, spread).reshape(-1, 1, 1)
                u = (noise - value).expand_as(v)
                error = terms.prediction_error(v.float(), u.float(), nodes.reshape(-1, 1).float(), "likelihood")
                total += float(weight * error.double().mean())
        return total

    def log_density(mean, spread):
        return float((-0.5 * ((x0 - mean) / spread) ** 2 - math.log(spread)).sum())

    pair = ((0.2, 0.9), (-0.1, 1.2))  # (mean, spread) of student and reference
    implicit = expected_error(*pair[1]) - expected_error(*pair[0])
    assert implicit == pytest.approx(log_density(*pair[0]) - log_density(*pair[1]), abs=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "softmax", "hard"])
def test_halves_are_the_product_of_two_residuals(weighting):
    r, a, group = draw(levels=5)
    weights = {
        "uniform": [None],
        "softmax": [terms.softmax_weight(a, group, tau) for tau in (0.2, -0.2)],
        "hard": [terms.half_weight(a, group, sign) for sign in (1, -1)],
    }[weighting]
    expected = torch.zeros(1, len(a), dtype=torch.float64)
    for weight in weights:
        even, odd = ((0.7 * terms.center(r[k::2].mean(0), group, weight) - terms.center(a, group, weight)) for k in (0, 1))
        expected = expected + 5.0 / 0.7 * even * odd / len(weights)
    torch.testing.assert_close(loss(r, a, group, weighting=weighting, levels="halves"), expected)


@pytest.mark.parametrize("source", ["rollout", "continuous"])
def test_halves_estimate_one_r_though_it_differs_from_level_to_level(source):
    """Over draws of noise levels, the expected loss is that of R's mean over all levels: halves that differ win nothing."""
    config, grid = NoiseConfig(source=source, levels=4, minimum=0.05), torch.linspace(1, 0.1, 10)
    slope, a, group = draw(sizes=(8,), levels=1)
    drawn = torch.stack([group_levels(config, grid, seed=0, step=s, group=0, halves=True) for s in range(8000)]).double()
    levels, everywhere = 3 * drawn**2, (3 * grid**2).mean() if source == "rollout" else (0.999**3 - 0.05**3) / 0.949
    expected = loss(slope * everywhere, a, group).mean().item()
    r = (levels.T[:, :, None] * slope).flatten(1)
    found = loss(r, a.repeat(8000), torch.arange(8000).repeat_interleave(8), levels="halves").mean().item()
    assert found == pytest.approx(expected, rel=0.03)


def test_halves_do_not_see_the_noise_of_r():
    """R = truth + noise: the expected loss is that of the truth, while the average's is larger by its variance."""
    draws, levels, deviation = 20_000, 4, 2.0
    truth, a, _ = draw(sizes=(8,), levels=1)
    group = torch.arange(draws).repeat_interleave(8)
    noise = torch.randn(levels, 8 * draws, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r, many = truth.repeat(1, draws) + deviation * noise, a.repeat(draws)
    expected = loss(truth, a, torch.zeros(8, dtype=torch.long)).mean().item()
    halves, average = (loss(r, many, group, levels=how).mean().item() for how in ("halves", "average"))
    assert halves == pytest.approx(expected, rel=0.03)
    bias = 5.0 / 0.7 * 0.7**2 * deviation**2 / levels * 7 / 8  # clip / beta * beta^2 variance / levels, less what centering takes
    assert average - expected == pytest.approx(bias, rel=0.03)
