"""The closed forms, each against something that does not use them; and the library's objective against the closed forms."""

import copy
import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from crd.objectives.terms import center, noised, prediction_error
from crd.toy import experiments, gaussian, problem
from crd.toy.distances import energy_distance, mean_interval
from crd.toy.students import MixtureStudent, NetworkStudent, draw, heun
from crd.toy.train import Settings, draw_noise, policy, train


def double(mixture):
    return problem.Mixture(mixture.log_weight.double(), mixture.mean.double(), mixture.variance.double())


def torch_mixture(mixture, prompt, sigma=0.0):
    """One prompt's distribution of x_sigma as a torch distribution."""
    marginal = (1 - sigma) ** 2 * mixture.variance[prompt] + sigma**2
    normal = Normal((1 - sigma) * mixture.mean[prompt], marginal.sqrt()[:, None].expand(-1, 2))
    return MixtureSameFamily(Categorical(logits=mixture.log_weight[prompt]), Independent(normal, 1))


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.7, 0.98])
def test_velocity_is_that_of_the_score(sigma):
    reference = double(problem.mixture_problem().reference)
    x = torch.randn(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for prompt in range(3):
        leaf = x[prompt].clone().requires_grad_(True)
        score = torch.autograd.grad(torch_mixture(reference, prompt, sigma).log_prob(leaf).sum(), leaf)[0]
        expected = (-sigma * score - leaf.detach()) / (1 - sigma)  # velocity from the noise E[eps | x] = -sigma score
        which = torch.full((4,), prompt)
        actual = problem.velocity(reference, x[prompt], torch.full((4,), sigma, dtype=torch.float64), which)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_tilt_density_and_expected_reward_agree_with_a_grid():
    case = problem.mixture_problem(offsets=(0.4, 0.0, -0.3), eta=0.8)
    line = torch.linspace(-9, 9, 601)
    x = torch.cartesian_prod(line, line)
    cell = (18 / 600) ** 2
    for c in range(3):
        prompt = torch.full((len(x),), c)
        reward = case.reward(x, prompt)
        reference = torch_mixture(case.reference, c).log_prob(x).exp()
        unnormalised = reference * (case.eta * reward).exp()
        z = float(unnormalised.sum() * cell)
        assert float(problem.log_normaliser(case)[c]) == pytest.approx(math.log(z), abs=1e-4)
        torch.testing.assert_close(problem.log_density(case.solution, x, prompt).exp(), unnormalised / z, rtol=1e-3, atol=1e-5)
        mean_reward = float((unnormalised / z * reward).sum() * cell)
        assert float(problem.expected_reward(case.solution, case.reward)[c]) == pytest.approx(mean_reward, abs=1e-4)
        own = problem.sample(case.solution, 40_000, 0)[c]
        torch.testing.assert_close(own.mean(0), (unnormalised[:, None] / z * x).sum(0) * cell, rtol=0, atol=0.03)


def test_a_reward_that_outgrows_the_reference_is_refused():
    case = problem.mixture_problem()
    with pytest.raises(ValueError, match="no integral"):
        problem.tilt(case.reference, case.reward, -20.0)


def test_fitted_tilt_recovers_the_tilt():
    case = problem.mixture_problem(offsets=(1.0, 0.0, -1.0))
    for strength in (0.0, 0.7, 2.5):
        mean_reward = problem.expected_reward(problem.tilt(case.reference, case.reward, strength), case.reward)
        torch.testing.assert_close(problem.fitted_tilt(case, mean_reward), torch.full((3,), strength), rtol=0, atol=1e-3)


def implicit_reward(new, old, x0, levels=400, noises=64):
    """R by the library's likelihood weighting, for fields of (x, sigma): midpoints over sigma, antithetic noise."""
    rng = torch.Generator().manual_seed(5)
    sigma = ((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).repeat_interleave(2 * noises)
    sigma = sigma[:, None].expand(-1, len(x0))
    eps = torch.randn(levels, noises, len(x0), 2, dtype=torch.float64, generator=rng)
    eps = torch.cat([eps, -eps], 1).flatten(0, 1)
    x, target = noised(x0, eps, sigma), eps - x0
    errors = [prediction_error(field(x, sigma), target, sigma, "likelihood") for field in (old, new)]
    return (errors[0] - errors[1]).mean(0)


def test_implicit_reward_of_exact_fields_is_the_log_ratio():
    case = problem.mixture_problem()
    reference, solution = double(case.reference), double(case.solution)
    prompt = torch.tensor([0, 0, 1, 1, 2, 2])
    x0 = problem.sample(reference, 2, 3).flatten(0, 1)
    fields = [lambda x, sigma, m=m: problem.velocity(m, x, sigma, prompt) for m in (solution, reference)]
    expected = problem.log_density(solution, x0, prompt) - problem.log_density(reference, x0, prompt)
    torch.testing.assert_close(implicit_reward(*fields, x0), expected, rtol=0, atol=0.04)
    reward = case.eta * case.reward(x0.float(), prompt).double()
    torch.testing.assert_close(center(expected, prompt), center(reward, prompt), rtol=0, atol=1e-5)


@pytest.mark.parametrize("power", [0, 2])
def test_profiles_have_the_slope_and_the_samples_that_are_claimed(power):
    """Two free fields with the same implicit reward, of which only the constant profile samples p*."""
    case = problem.gaussian_problem(eta=1.0)
    variance, b = 0.36, case.reward.linear[0].double()
    slope = gaussian.slope(gaussian.SIGMA**power, variance)
    prompt = torch.zeros(4, dtype=torch.long)
    reference = double(case.reference)

    def profiled(x, sigma):
        k = sigma / ((1 - sigma) ** 2 * variance + sigma**2)
        exact = problem.velocity(reference, x, sigma, prompt if x.shape[-2] == 4 else torch.zeros(x.shape[-2], dtype=torch.long))
        return exact - (variance * sigma**power / slope * k)[..., None] * b

    x0 = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    implicit = implicit_reward(profiled, lambda x, sigma: problem.velocity(reference, x, sigma, prompt), x0)
    torch.testing.assert_close(center(implicit, prompt), center(x0 @ b, prompt), rtol=0, atol=0.03)

    start = torch.zeros(1, 2, dtype=torch.float64)  # the field is affine, so the mean of the samples starts at the noise's mean
    mean = heun(profiled, start, torch.linspace(1, 0, 400, dtype=torch.float64))
    tilt = float(mean @ b)  # the reward's variance is 1
    assert tilt == pytest.approx(gaussian.sampled_tilt(gaussian.SIGMA**power, variance) / slope, abs=1e-3)
    assert (abs(tilt - 1) < 1e-3) == (power == 0)


@pytest.mark.parametrize("weight", ["likelihood", "plain"])
def test_predicted_rounds_minimise_the_loss_on_a_fine_grid_of_tilts(weight):
    variance, strength, members = 0.36, 0.8, 16
    case = gaussian.GaussianCase(variance, 1 / variance, 0.5, members)
    reference = double(problem.gaussian_problem().reference)
    sigma = torch.from_numpy(gaussian.SIGMA)
    prompt = torch.zeros(len(sigma), dtype=torch.long)
    x = torch.randn(len(sigma), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def distance(t):
        moved = problem.Mixture(
            reference.log_weight, reference.mean + t * variance**0.5 * torch.tensor([1.0, 0.0]), reference.variance
        )
        squared = (problem.velocity(moved, x, sigma, prompt) - problem.velocity(reference, x, sigma, prompt)).square()
        weighted = squared.sum(-1) * (1 - sigma) / sigma if weight == "likelihood" else squared.mean(-1)
        return float(weighted.mean())

    curvature = distance(1.0)
    assert gaussian.anchor_curvature(case, weight) == pytest.approx(curvature, rel=1e-3)
    grid = torch.linspace(0, 3, 300_001, dtype=torch.float64)
    old = 0.0
    for predicted in gaussian.predicted_tilts(case, strength, weight, 4)[1:]:
        loss = (1 - 1 / members) * (grid - old - 0.5).square() + strength * curvature * grid.square()
        old = float(grid[loss.argmin()])
        assert predicted == pytest.approx(old, abs=1e-3)
    assert gaussian.predicted_tilts(case, strength, weight, 300)[-1] == pytest.approx(
        gaussian.fixed_point(case, strength, weight)
    )


def test_energy_distance_of_two_normals():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 1, generator=rng), torch.randn(4000, 1, generator=rng)
    assert abs(float(energy_distance(a, b))) < 3e-3
    apart = 1.5
    expected_gap = 2 / math.sqrt(math.pi) * math.exp(-(apart**2) / 4) + apart * math.erf(apart / 2)  # E|N(m, 2)|
    assert float(energy_distance(a, b + apart)) == pytest.approx(2 * expected_gap - 4 / math.sqrt(math.pi), abs=0.04)
    small = torch.tensor([[0.0], [1.0], [3.0]])
    assert float(energy_distance(small, small[:2])) == pytest.approx(2 * 7 / 6 - 2 - 1)


def test_mean_interval():
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval["mean"] == 2
    assert interval["half_width"] == pytest.approx(4.303 / math.sqrt(3), abs=1e-5)


def test_noise_levels_are_shared_by_a_group_stratified_and_antithetic():
    settings = Settings(levels=8, group_size=5, estimate="halves")
    sigma, eps = draw_noise(settings, 2, torch.Generator().manual_seed(0))
    assert sigma.shape == (8, 10) and eps.shape == (8, 10, 2)
    assert (sigma[:, :5] == sigma[:, :1]).all() and (sigma[:, 0] != sigma[:, 5]).all()
    halves = sigma[:, 0].unflatten(0, (2, 2, 2))  # half, sign, stratum
    assert (halves[:, 0] == halves[:, 1]).all() and (halves[0, 0] != halves[1, 0]).all()
    assert ((halves * 2).floor() == torch.tensor([0.0, 1.0])).all()
    noise = eps.unflatten(0, (2, 2, 2))
    assert (noise[:, 0] == -noise[:, 1]).all() and (noise[0, 0] != noise[1, 0]).all()


def test_noise_of_r_biases_every_square_but_the_product_of_halves():
    rng = torch.Generator().manual_seed(0)
    members, levels, repeats = 8, 4, 20_000
    group = torch.arange(repeats).repeat_interleave(members)
    truth = torch.randn(members, generator=rng).repeat(repeats)
    target = torch.randn(members, generator=rng).repeat(repeats)
    noisy = truth + torch.randn(levels, members * repeats, generator=rng)
    exact = float(policy(truth[None], target, group, "average"))
    within = 1 - 1 / members  # variance of a centered draw of unit variance
    for estimate, bias in (("halves", 0), ("average", within / levels), ("per_level", within)):
        assert float(policy(noisy, target, group, estimate)) == pytest.approx(exact + bias, abs=0.02)


def test_both_students_start_as_the_reference_and_the_sampler_draws_it():
    case = problem.mixture_problem()
    x, prompt = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
    sigma = torch.full((2, 6), 0.4)
    for student in (MixtureStudent(case.reference), NetworkStudent(case.reference, seed=0)):
        torch.testing.assert_close(student(x, sigma, prompt), problem.velocity(case.reference, x, sigma, prompt))
    floor = experiments.measure(case, problem.sample(case.solution, 2000, 1), 0)
    drawn = experiments.measure_field(case, case.solution, 0)
    assert abs(floor["energy"]) < 2e-3 and abs(drawn["energy"]) < 2e-3
    assert drawn["tilt"] == pytest.approx(1, abs=0.06)


SHORT = Settings(steps=150, learning_rate=3e-2, estimate="halves", group_size=32)


def short_run(case, seed=0, **changes):
    settings = Settings(**{**vars(SHORT), **changes})
    return experiments.trained(case, MixtureStudent(case.reference), settings, seed)


def test_a_mixture_student_reaches_the_solution_only_with_centering_per_prompt():
    case = problem.mixture_problem(offsets=(3.0, 0.0, -3.0))
    start = experiments.measure_field(case, case.reference, 0)
    right = experiments.measure_field(case, short_run(case), 0)
    wrong = experiments.measure_field(case, short_run(case, centering="batch"), 0)
    assert right["energy"] < 0.02 * start["energy"]
    assert all(abs(right[f"tilt_{c}"] - 1) < 0.15 for c in range(3))
    assert wrong["energy"] > 10 * right["energy"]


def test_a_network_student_with_the_likelihood_anchor_moves_towards_the_solution():
    case = problem.mixture_problem()
    settings = Settings(steps=150, group_size=32, anchor=0.5)
    student = experiments.trained(case, NetworkStudent(case.reference, 0), settings, 0)
    start, reached = (experiments.measure_field(case, field, 0)["energy"] for field in (case.reference, student))
    assert reached < 0.2 * start


def test_a_run_is_a_function_of_its_seed():
    case = problem.mixture_problem()
    weights = [short_run(case, seed, steps=5).mean.detach() for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_moving_reference_adds_a_tilt_per_round():
    case = problem.gaussian_problem()
    student = MixtureStudent(case.reference)
    settings = Settings(steps=100, learning_rate=1e-2, group_size=32)
    for number in range(2):
        old = copy.deepcopy(student)
        pool = draw(student, 3200, 1, 0, number).unflatten(1, (100, 32))
        train((student, old, old), case, settings, lambda step, pool=pool: pool[:, step], seed=0, part=number)
    samples = draw(student, 4000, 1, 0, "end")[0]
    assert float(case.reward(samples, torch.zeros(4000, dtype=torch.long)).mean()) == pytest.approx(2 * case.eta, abs=0.1)
