"""A suite: tasks x variants x seeds, read from a YAML file; and the runs that it stands for."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from crd.config import CRDConfig, Section
from crd.errors import CRDError
from crd.recipe import build_config, load_config, plain

Tree = dict[str, Any]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OWN = ("output_dir", "seed")  # settings of a run that the suite decides
BASELINES = "baselines"  # folder beside the variants


class Task(Section):
    recipe: Path
    """recipe of the task; a relative path starts at the suite's folder"""
    overrides: Tree = Field(default_factory=dict)
    """settings of all runs of the task"""


class Claim(Section):
    text: str
    """the claim in words"""
    more: str
    """variant or baseline that is said to have more"""
    less: str
    """variant or baseline that is said to have less"""
    metric: str = "reward"
    """of what: a metric of the last evaluation"""
    tasks: tuple[str, ...] = ()
    """tasks for which it is claimed; none: all"""


class Suite(Section):
    """A comparison. Settings are merged in this order: recipe, ``overrides``, those of the task, those of the variant."""

    name: str
    """title of the report"""
    output: Path
    """run folders are OUTPUT/TASK/VARIANT/seed-N"""
    seeds: tuple[int, ...] = Field(min_length=1)
    """every task and variant is run with each of them"""
    forward_passes: int | None = Field(None, ge=1)
    """rows through the backbone per run, in rollouts and training, a backward counts as two; decides train.epochs"""
    workers: int | None = Field(None, ge=1)
    """runs at once, one CPU thread each; none: one per GPU, or per CPU core where there is no GPU"""
    overrides: Tree = Field(default_factory=dict)
    """settings of all runs"""
    tasks: dict[str, Task] = Field(min_length=1)
    """name -> recipe and settings"""
    variants: dict[str, Tree] = Field(min_length=1)
    """name -> settings"""
    baselines: dict[str, float] = Field(default_factory=dict)
    """name -> guidance scale of the pretrained model, evaluated once per task"""
    labels: dict[str, str] = Field(default_factory=dict)
    """names of tasks, variants and baselines as figures and tables show them"""
    reference: str | None = None
    """variant that the others are compared with; none: the first"""
    metrics: tuple[str, ...] = ()
    """metrics in the tables, in this order; none: all that were measured"""
    sweeps: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """name -> variants that differ in one setting, in its order: connected in the frontier"""
    claims: tuple[Claim, ...] = ()
    """what the comparison is to decide"""

    @property
    def compared_with(self) -> str:
        return self.reference or next(iter(self.variants))

    def label(self, name: str) -> str:
        return self.labels.get(name, name)

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        names = [*self.tasks, *self.variants, *self.baselines]
        for name in names:
            if not NAME.fullmatch(name) or name == BASELINES:
                raise ValueError(f"{name!r} cannot be the name of a folder here: use letters, digits, dots and dashes")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
        if both := self.variants.keys() & self.baselines.keys():
            raise ValueError(f"{', '.join(sorted(both))} cannot be both a variant and a baseline")
        _known("reference", [self.compared_with], self.variants)
        _known("labels", self.labels, names)
        for title, members in self.sweeps.items():
            _known(f"sweeps.{title}", members, self.variants)
        for claim in self.claims:
            _known("claims", [claim.more, claim.less], [*self.variants, *self.baselines])
            _known("claims", claim.tasks, self.tasks)
            if {claim.more, claim.less} <= self.baselines.keys():
                raise ValueError(f"claims: {claim.more} and {claim.less} are both baselines, of one evaluation each: no interval")
        for tree in (self.overrides, *(task.overrides for task in self.tasks.values()), *self.variants.values()):
            if own := [key for key in OWN if key in tree]:
                raise ValueError(f"{', '.join(own)} cannot be overridden: it follows from output and seeds")
        return self


def _known(setting: str, names: Iterable[str], known: Iterable[str]) -> None:
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{setting}: there is no {', '.join(missing)}; there are {', '.join(known)}")


@dataclass(frozen=True)
class Run:
    """One run of a suite with its resolved settings."""

    task: str
    variant: str
    seed: int
    config: CRDConfig

    @property
    def name(self) -> str:
        return f"{self.task}/{self.variant}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.output_dir


def load_suite(path: Path) -> Suite:
    """Reads a suite; raises CRDError for anything wrong."""
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise CRDError(f"there is no suite {path}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CRDError(f"the suite {path} cannot be read: {error}") from None
    try:
        suite = Suite.model_validate(data)
    except ValidationError as error:
        raise CRDError(f"the suite {path} is not valid:\n" + "\n".join(_explain(p) for p in error.errors())) from None
    tasks = {name: task.model_copy(update={"recipe": path.parent / task.recipe}) for name, task in suite.tasks.items()}
    return suite.model_copy(update={"tasks": tasks})


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "suite"
    if problem["type"] == "extra_forbidden":
        sections: dict[Any, type[Section]] = {"tasks": Task, "claims": Claim}
        section = sections.get(problem["loc"][0], Suite)
        return f"  {where}: there is no such setting. There are: {', '.join(section.model_fields)}."
    message = problem["msg"].removeprefix("Value error, ")
    return f"  {where}: {message}" + (f", got {problem['input']!r}" if problem["loc"] else "")


def merged(tree: Tree, over: Tree) -> Tree:
    """``tree`` with the settings of ``over`` in their places; lists are replaced whole."""
    result = dict(tree)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


def suite_runs(suite: Suite) -> list[Run]:
    """All runs, seed by seed, so that a suite that is cut short has whole seeds; raises CRDError naming task and variant."""
    trees = {task: _task_tree(suite, task) for task in suite.tasks}
    return [
        Run(task, variant, seed, _run_config(suite, trees[task], task, variant, seed))
        for seed in suite.seeds
        for task in suite.tasks
        for variant in suite.variants
    ]


def task_config(suite: Suite, task: str) -> CRDConfig:
    """The settings that the variants of a task start from, which are those of its baselines."""
    return _built(merged(_task_tree(suite, task), {"output_dir": str(suite.output / task / BASELINES)}), task)


def _task_tree(suite: Suite, task: str) -> Tree:
    tree = plain(load_config(suite.tasks[task].recipe, []))
    for over in ({"evaluation": {"before": False}}, suite.overrides, suite.tasks[task].overrides):
        tree = merged(tree, over)
    return tree


def _run_config(suite: Suite, tree: Tree, task: str, variant: str, seed: int) -> CRDConfig:
    folder = suite.output / task / variant / f"seed-{seed}"
    where = f"{task}/{variant}"
    config = _built(merged(merged(tree, suite.variants[variant]), {"output_dir": str(folder), "seed": seed}), where)
    if suite.forward_passes is None:
        return config
    epochs = budget_epochs(suite.forward_passes, config, where)
    return config.model_copy(update={"train": config.train.model_copy(update={"epochs": epochs})})


def budget_epochs(forward_passes: int, config: CRDConfig, where: str) -> int:
    """Epochs whose forward passes come nearest to a budget; raises CRDError if that is none."""
    from crd.plan.counts import forwards_per_epoch

    per_epoch = forwards_per_epoch(config)
    if epochs := int(forward_passes / per_epoch + 0.5):
        return epochs
    raise CRDError(f"forward_passes: {forward_passes} is less than half an epoch of {where}, which takes {per_epoch:.0f}.")


def _built(tree: Tree, where: str) -> CRDConfig:
    try:
        return build_config(tree)
    except CRDError as error:
        raise CRDError(f"{where}: {error}") from None
