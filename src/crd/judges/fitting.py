"""Which judges fit the prompts of an evaluation: they run by default, beside the reward and never trained on."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from crd.batch import PromptGroup
from crd.errors import CRDError
from crd.log import logger
from crd.rewards.named import resolve_reward
from crd.rewards.ocr import quoted_target
from crd.rewards.protocol import NamedReward

NANO_SIZE = (64, 64)
SET_JUDGES = ("vendi", "frechet")  # of all pictures together

SetJudges = Callable[[list[Image.Image], list[str], list[dict[str, Any]], int], dict[str, float]]


def is_nano_world(prompts: list[PromptGroup], size: tuple[int, int]) -> bool:
    """Whether the nano world, which its judges know, could draw all of these prompts; ``size`` is width and height."""
    from crd.nano.judges.sets import of_this_world  # here, since the world loads matplotlib

    return size == NANO_SIZE and of_this_world([prompt.metadata for prompt in prompts])


def fitting_judges(prompts: list[PromptGroup], size: tuple[int, int], rewards: list[NamedReward]) -> list[NamedReward]:
    """Per-picture judges for these prompts that are not among the rewards; what is not installed is left out with a warning."""
    names = ["saturation", "background"]
    if any(quoted_target(prompt.text) for prompt in prompts):
        names.append("tesseract")
    if is_nano_world(prompts, size):
        names.append("alignment")
        if any("include" in prompt.metadata for prompt in prompts):
            names.append("geneval_net")
    judges = []
    for name in names:
        if name in {reward.name for reward in rewards}:
            continue
        try:
            judges.append(NamedReward(name, resolve_reward(name, {}), 0.0))
        except CRDError as error:
            logger.warning("the judge %s is left out: %s", name, error)
    return judges


def fitting_set_judges(prompts: list[PromptGroup], size: tuple[int, int]) -> SetJudges | None:
    """Judges of all pictures together, if there are any for these prompts."""
    if not is_nano_world(prompts, size):
        return None
    from crd.nano.judges import set_judges

    return set_judges
