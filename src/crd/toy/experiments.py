"""The five experiments of docs/closed-form.md. Every number is a function of the seed."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from crd.toy.distances import energy_distance, mean_interval
from crd.toy.gaussian import GaussianCase, Weight, fixed_point, predicted_tilts
from crd.toy.problem import Mixture, Problem, fitted_tilt, gaussian_problem, mixture_problem, sample
from crd.toy.students import MixtureStudent, NetworkStudent, Student, draw
from crd.toy.train import Draw, Settings, train

EVALUATED = 2000  # samples per prompt
CHECKPOINTS = (0, 12, 25, 50, 100, 200, 300, 400)
MIXTURE = Settings(steps=400, learning_rate=2e-2, estimate="halves")
NETWORK = Settings(steps=800, learning_rate=5e-3, group_size=32)
ROUND = Settings(steps=120, learning_rate=5e-3, group_size=32)
ROUNDS = 12
ROUND_EVALUATED = 4000
STRENGTHS = (0.0, 0.1, 0.3, 1.0)
LEVELS = (1, 2, 4, 8, 16)

Numbers = dict[str, float]
Run = Callable[[int], Numbers]


def over_seeds(name: str, runs: dict[str, Run], seeds: int) -> dict[str, Any]:
    """For every variant and number: mean, half-width of the 95 % interval and the single values."""
    result: dict[str, Any] = {}
    with tqdm(total=len(runs) * seeds, desc=name, unit="run") as bar:
        for variant, run in runs.items():
            rows = []
            for seed in range(seeds):
                rows.append(run(seed))
                bar.update()
            columns = {key: [round(row[key], 5) for row in rows] for key in rows[0]}
            result[variant] = {key: {**mean_interval(values), "values": values} for key, values in columns.items()}
    return result


def measure(problem: Problem, samples: Tensor, seed: int) -> Numbers:
    """Energy distance to exact samples of the solution (mean over prompts, and each), and fitted tilts over eta."""
    exact = sample(problem.solution, samples.shape[1], seed, "evaluation")
    distance = energy_distance(samples, exact)
    prompt = torch.arange(problem.prompts).repeat_interleave(samples.shape[1])
    mean_reward = problem.reward(samples.flatten(0, 1), prompt).view(problem.prompts, -1).mean(1)
    tilts = fitted_tilt(problem, mean_reward) / problem.eta
    numbers = {"energy": float(distance.mean()), "tilt": float(tilts.mean())}
    for c in range(problem.prompts):
        numbers |= {f"energy_{c}": float(distance[c]), f"tilt_{c}": float(tilts[c])}
    return numbers


def measure_field(problem: Problem, field: Student | Mixture, seed: int) -> Numbers:
    return measure(problem, draw(field, EVALUATED, problem.prompts, seed, "evaluation"), seed)


def from_reference(problem: Problem, settings: Settings, seed: int) -> Draw:
    """Fresh exact samples of the reference at every step."""
    return lambda step: sample(problem.reference, settings.group_size, seed, step, "x0")


def trained(problem: Problem, student: Student, settings: Settings, seed: int, draw_x0: Draw | None = None) -> Student:
    """The student after training with itself, as it was at first, as fixed reference and as anchor."""
    old = copy.deepcopy(student)
    train((student, old, old), problem, settings, draw_x0 or from_reference(problem, settings, seed), seed=seed)
    return student


# ---------------------------------------------------------------------------------------------- A


def training_curve(problem: Problem, settings: Settings, seed: int) -> Numbers:
    """Distance and tilt of a mixture student at every checkpoint, keys ``energy@step``."""
    student = MixtureStudent(problem.reference)
    old = copy.deepcopy(student)
    numbers: Numbers = {}

    def watch(step: int) -> None:
        if step in CHECKPOINTS:
            measured = measure_field(problem, student, seed)
            numbers.update({f"{key}@{step}": measured[key] for key in ("energy", "tilt")})
            numbers.update(measured)

    watch(0)
    train((student, old, old), problem, settings, from_reference(problem, settings, seed), seed=seed, watch=watch)
    return numbers


def fixed_reference(seeds: int) -> dict[str, Any]:
    """A: does the student reach p*? A student that is always a density, and a free network with and without an anchor."""
    problem = mixture_problem()
    runs: dict[str, Run] = {
        "floor": lambda seed: measure(problem, sample(problem.solution, EVALUATED, seed, "floor"), seed),
        "exact field": lambda seed: measure_field(problem, problem.solution, seed),
        "reference": lambda seed: measure_field(problem, problem.reference, seed),
        "mixture, halves": lambda seed: training_curve(problem, MIXTURE, seed),
        "mixture, average": lambda seed: training_curve(problem, _with(MIXTURE, estimate="average"), seed),
    }
    for strength in STRENGTHS:
        for estimate in ("average", "halves"):
            settings = _with(NETWORK, anchor=strength, estimate=estimate)
            runs[f"network, {estimate}, anchor {strength:g}"] = _network_run(problem, settings)
    runs["network, average, plain anchor 0.3"] = _network_run(problem, _with(NETWORK, anchor=0.3, anchor_weight="plain"))
    runs["network, exact normaliser"] = _network_run(problem, _with(NETWORK, estimate="halves", centering="exact"))
    return over_seeds("A fixed reference", runs, seeds)


def _with(settings: Settings, **changes: Any) -> Settings:
    return Settings(**{**vars(settings), **changes})


def _network_run(problem: Problem, settings: Settings) -> Run:
    return lambda seed: measure_field(problem, trained(problem, NetworkStudent(problem.reference, seed), settings, seed), seed)


# ---------------------------------------------------------------------------------------------- B


def rounds(problem: Problem, student: Student, settings: Settings, seed: int) -> Numbers:
    """Tilt (in units of r, not of eta) after every round; each starts with old and the samples taken from the student."""
    pretrained = copy.deepcopy(student)
    numbers: Numbers = {"tilt@0": 0.0}
    for number in range(ROUNDS):
        old = copy.deepcopy(student)
        pool = draw(student, settings.group_size * settings.steps, 1, seed, number, "rollout")

        def from_pool(step: int, pool: Tensor = pool) -> Tensor:
            return pool[:, step * settings.group_size : (step + 1) * settings.group_size]

        train((student, old, pretrained), problem, settings, from_pool, seed=seed, part=number)
        samples = draw(student, ROUND_EVALUATED, 1, seed, number, "evaluation")
        mean_reward = problem.reward(samples[0], torch.zeros(samples.shape[1], dtype=torch.long)).mean()
        numbers[f"tilt@{number + 1}"] = float(mean_reward)  # the reward has variance 1, so its mean is the tilt
    return numbers


def moving_reference(seeds: int) -> dict[str, Any]:
    """B: the tilt by rounds, without an anchor and with, next to the prediction."""
    problem = gaussian_problem()
    variance = float(problem.reference.variance[0, 0])
    case = GaussianCase(variance, 1 / variance, problem.eta, ROUND.group_size)
    mixture = _with(ROUND, learning_rate=1e-2)
    runs: dict[str, Run] = {}
    predicted: dict[str, Any] = {}
    anchors: list[tuple[float, Weight]] = [(0.0, "likelihood"), (2.0, "likelihood"), (1.0, "likelihood"), (0.5, "likelihood")]
    for strength, weight in [*anchors, (1.0, "plain")]:
        name = f"{weight} anchor {strength:g}" if strength else "no anchor"
        changes = {"anchor": strength, "anchor_weight": weight}
        runs[f"mixture, {name}"] = _rounds_run(problem, _with(mixture, **changes), free=False)
        predicted[f"mixture, {name}"] = {"rounds": predicted_tilts(case, strength, weight, ROUNDS)}
        if weight == "likelihood":  # the plain one picks another profile over noise levels for a free field
            runs[f"network, {name}"] = _rounds_run(problem, _with(ROUND, **changes), free=True)
        if strength > 0:
            predicted[f"mixture, {name}"]["fixed_point"] = fixed_point(case, strength, weight)
    name = "mixture, likelihood anchor 1, per level"  # the noise of R slows every round down and leaves the fixed point
    per_level = _with(mixture, anchor=1.0, estimate="per_level")
    runs[name] = _rounds_run(problem, per_level, free=False)
    predicted[name] = {"fixed_point": fixed_point(case, 1.0, "likelihood")}
    return {"measured": over_seeds("B moving reference", runs, seeds), "predicted": predicted}


def _rounds_run(problem: Problem, settings: Settings, free: bool) -> Run:
    def run(seed: int) -> Numbers:
        student = NetworkStudent(problem.reference, seed) if free else MixtureStudent(problem.reference)
        return rounds(problem, student, settings, seed)

    return run


# ---------------------------------------------------------------------------------------------- C, D, E


def centering(seeds: int) -> dict[str, Any]:
    """C: prompts whose mean rewards lie 3 apart, centered per prompt and over the batch."""
    problem = mixture_problem(offsets=(3.0, 0.0, -3.0))
    runs: dict[str, Run] = {}
    for over in ("prompt", "batch"):
        mixture, network = _with(MIXTURE, centering=over), _with(NETWORK, centering=over, anchor=0.3)
        runs[f"mixture, {over}"] = _mixture_run(problem, mixture)
        runs[f"network, {over}"] = _network_run(problem, network)
    return over_seeds("C centering", runs, seeds)


def _mixture_run(problem: Problem, settings: Settings) -> Run:
    return lambda seed: measure_field(problem, trained(problem, MixtureStudent(problem.reference), settings, seed), seed)


def level_estimates(seeds: int) -> dict[str, Any]:
    """D: the square of every level, of their average, and of two halves, at equal numbers of network evaluations."""
    problem = mixture_problem()
    runs: dict[str, Run] = {}
    for estimate, antithetic in (("per_level", False), ("average", False), ("average", True), ("halves", False)):
        for levels in LEVELS[1:] if antithetic or estimate == "halves" else LEVELS:
            settings = _with(MIXTURE, estimate=estimate, levels=levels, antithetic=antithetic)
            runs[f"{estimate}{', antithetic' if antithetic else ''}, {levels}"] = _mixture_run(problem, settings)
    return over_seeds("D noise levels", runs, seeds)


def samplers(seeds: int) -> dict[str, Any]:
    """E: the clean samples come from the reference, from a broad Gaussian, or half from the reference, half from the student."""
    problem = mixture_problem()
    broad = Mixture(torch.zeros(3, 1), torch.zeros(3, 1, 2), torch.full((3, 1), 2.25))
    half = MIXTURE.group_size // 2

    def decoupled(seed: int) -> Numbers:
        student = MixtureStudent(problem.reference)

        def halves(step: int) -> Tensor:
            now = Mixture(student.log_weight.detach(), student.mean.detach(), student.log_variance.detach().exp())
            return torch.cat([sample(problem.reference, half, seed, step, "x0"), sample(now, half, seed, step, "own")], 1)

        return measure_field(problem, trained(problem, student, MIXTURE, seed, halves), seed)

    def from_broad(seed: int) -> Numbers:
        student = MixtureStudent(problem.reference)
        wide: Draw = lambda step: sample(broad, MIXTURE.group_size, seed, step, "x0")  # noqa: E731
        return measure_field(problem, trained(problem, student, MIXTURE, seed, wide), seed)

    runs: dict[str, Run] = {
        "reference": _mixture_run(problem, MIXTURE),
        "broad": from_broad,
        "reference and student": decoupled,
    }
    return over_seeds("E samplers", runs, seeds)


EXPERIMENTS = {
    "fixed_reference": fixed_reference,
    "moving_reference": moving_reference,
    "centering": centering,
    "level_estimates": level_estimates,
    "samplers": samplers,
}
