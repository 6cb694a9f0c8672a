"""What ``crd eval`` measures: prompts, scores and pictures per prompt under one name."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from crd.batch import PromptGroup
from crd.config import CRDConfig, RewardConfig
from crd.errors import CRDError
from crd.prompt_sets.ocr import ocr_prompts
from crd.prompts import PromptSet, load_prompts, make_prompt_set
from crd.rewards.geneval.prompts import Row, generate
from crd.rewards.geneval.rules import TAGS
from crd.rewards.named import NAMED_REWARDS
from crd.seeding import derive_seed

OCR_PROMPTS = 250
DETECTOR = "facebook/mask2former-swin-small-coco-instance"  # for GenEval; not quite the benchmark's own weights
OPTIONS_FORM = 'expected is e.g. {"ocr": {"detect": true}}.'

SUITES = ("geneval", "ocr", "geneval-nano", "ocr-nano")


@dataclass(frozen=True)
class Suite:
    """Prompts with the scores that their pictures get."""

    name: str
    source: str  # of the prompts
    prompts: PromptSet
    rewards: tuple[RewardConfig, ...]  # with weight 0: shown only
    official: str | None = None  # the score that is averaged over GenEval's tasks
    noise_by_text: bool = True  # of a picture: from the prompt's text and the picture's number, else from its place

    def members(self, count: int | None) -> list[PromptGroup]:
        """The first prompts; None: all."""
        return self.prompts.first(len(self.prompts) if count is None else count)


def named_suite(name: str) -> Suite:
    """One of SUITES; raises CRDError for another name."""
    ocr = (RewardConfig(name="ocr"), RewardConfig(name="ocr_exact", weight=0))
    match name:
        case "geneval":  # detections are counted as the benchmark does, twice where the detector sees double
            rows = make_prompt_set(in_turn(generate()), name)
            correct = RewardConfig(name="geneval_correct", options={"mode": "reference", "detector": DETECTOR})
            return Suite(name, "the official 553, tasks in turn", rows, (correct,), "geneval_correct")
        case "geneval-nano":
            source = "nano/geneval/heldout"
            return Suite(name, source, load_prompts(source), (RewardConfig(name="geneval_correct"),), "geneval_correct")
        case "ocr":
            prompts = make_prompt_set(ocr_prompts("test", OCR_PROMPTS), name)
            return Suite(name, f"crd prompts ocr --split test --size {OCR_PROMPTS}", prompts, ocr)
        case "ocr-nano":
            source = "nano/text/heldout"
            return Suite(name, source, load_prompts(source), ocr)
    raise CRDError(f"--suite: {name!r} is none of {', '.join(SUITES)}.")


def own_suite(prompts: str, rewards: Sequence[RewardConfig]) -> Suite:
    """A prompt file or nano set with rewards of one's own; its noise is that of a run's evaluations on these prompts."""
    return Suite("prompts", prompts, load_prompts(prompts), tuple(rewards), noise_by_text=False)


def chosen_suites(
    config: CRDConfig,
    names: Sequence[str] = (),
    prompts: str | None = None,
    rewards: Sequence[str] = (),
    judges: Sequence[str] = (),
    options: str = "{}",
) -> list[Suite]:
    """Suites by name; or one of prompts and rewards, by default those of the settings. Raises CRDError for a mixture.

    Judges are added with weight 0. ``options`` is a JSON object with the options of rewards and judges by name.
    """
    if names and (prompts or rewards):
        raise CRDError("--suite has prompts and rewards of its own: leave out --prompts and --reward, or add scores by --judges.")
    if len(set(names)) < len(names):
        raise CRDError(f"--suite: each suite can be given once, got {', '.join(names)}.")
    known = {reward.name: reward for reward in (*config.rewards, *config.evaluation.judges)}

    def scored(name: str, weight: float) -> RewardConfig:
        return known.get(name, RewardConfig(name=name)).model_copy(update={"weight": weight})

    if names:
        suites = [named_suite(name) for name in names]
    else:
        _check_own(config, prompts, rewards)
        own = [scored(name, 1 / len(rewards)) for name in rewards]
        suites = [own_suite(prompts or config.prompts.evaluation, own or config.rewards)]
    extra = [scored(name, 0.0) for name in judges]
    return with_options([replace(suite, rewards=(*suite.rewards, *extra)) for suite in suites], read_options(options))


def _check_own(config: CRDConfig, prompts: str | None, rewards: Sequence[str]) -> None:
    """Raises CRDError where a run's own prompts or rewards are asked for that were objects in Python."""
    if not prompts and config.prompts.evaluation.startswith("<"):
        raise CRDError(
            f"the run was evaluated on {config.prompts.evaluation}, a list that was given in Python and is not kept. "
            "Give --prompts FILE."
        )
    lost = [] if rewards else [r.name for r in config.rewards if ":" not in r.name and r.name not in NAMED_REWARDS]
    if lost:
        raise CRDError(
            f"the run was trained on {', '.join(lost)}, which was given in Python and cannot be found by that name. "
            f"Give --reward FILE.py:{lost[0]}, or another one."
        )


def read_options(text: str) -> dict[str, dict[str, Any]]:
    """``{"NAME": {"option": value}}`` from JSON; raises CRDError for anything else."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise CRDError(f"--options: {text!r} is not JSON ({error.msg}); {OPTIONS_FORM}") from None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise CRDError(f"--options: got {text!r}; {OPTIONS_FORM}")
    return options


def with_options(suites: Sequence[Suite], options: dict[str, dict[str, Any]]) -> list[Suite]:
    """The suites with options of their rewards replaced; raises CRDError for a name that none of them scores with."""
    names = {reward.name for suite in suites for reward in suite.rewards}
    if unknown := options.keys() - names:
        raise CRDError(f"--options: {', '.join(sorted(unknown))} is not scored with; there are {', '.join(sorted(names))}.")

    def changed(reward: RewardConfig) -> RewardConfig:
        return reward.model_copy(update={"options": {**reward.options, **options.get(reward.name, {})}})

    return [replace(suite, rewards=tuple(changed(reward) for reward in suite.rewards)) for suite in suites]


def in_turn(rows: list[Row]) -> list[Row]:
    """One row of each task after the other, so that the first ones are a fair sample."""
    tasks = [[row for row in rows if row["tag"] == tag] for tag in TAGS]
    return [row for turn in itertools.zip_longest(*tasks) for row in turn if row is not None]


def noise_ids(prompts: Iterable[PromptGroup], pictures: int) -> list[int]:
    """Of picture ``k`` of each prompt: a function of its text and ``k``, whatever other prompts and pictures there are."""
    return [derive_seed(0, prompt.text, k) for prompt in prompts for k in range(pictures)]


def prompts_digest(prompts: Iterable[PromptGroup]) -> str:
    """SHA-256 of the prompts and their metadata as JSON lines."""
    lines = [json.dumps({**prompt.metadata, "prompt": prompt.text}) + "\n" for prompt in prompts]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
