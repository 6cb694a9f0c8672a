"""What is checked before a run begins, so that a mistake costs seconds and not a night."""

import sys
from collections.abc import Iterable, Sequence

from accelerate.tracking import get_available_trackers

from crd.alarm import trained_on
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.log import logger
from crd.models.family import Family
from crd.prompts import PromptSet
from crd.rewards.geneval.detector import Detector
from crd.rewards.geneval.prompts import COCO_CLASSES, COLORS
from crd.rewards.geneval.reward import GenEvalReward
from crd.rewards.geneval.rules import check_metadata
from crd.rewards.ocr import OCRReward, quoted_target
from crd.rewards.protocol import NamedReward


def check_trackers(config: CRDConfig) -> None:
    """Raises CRDError for a tracker that is not installed; accelerate would go on without it."""
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in config.trackers if name not in available]:
        raise CRDError(f"trackers: {', '.join(missing)} is not installed: pip install 'crd-diffusion[trackers]'.")


def warn_of_unknown_words(model: Family, prompts: Iterable[str]) -> None:
    """Logs words that the model's tokenizer does not know."""
    if unknown := dict.fromkeys(word for text in prompts for word in model.unknown_words(text)):
        logger.warning("the model's tokenizer does not know: %s", ", ".join(list(unknown)[:20]))


def warn_of_shared_prompts(train: PromptSet, evaluation: PromptSet) -> None:
    """Logs how many prompts to evaluate on are trained on too."""
    if shared := set(train.texts) & set(evaluation.texts):
        logger.warning(
            "%d of %d evaluation prompts are training prompts too, so they show what was learnt by heart; the first is %r",
            len(shared),
            len(evaluation),
            next(text for text in evaluation.texts if text in shared),
        )


def check_alarm_judges(config: CRDConfig, evaluated: Sequence[str]) -> None:
    """Raises CRDError if the alarm is to go by a judge that nobody asks, or that is trained on."""
    settings = config.alarm
    if learnt := [name for name in settings.judges or () if name in trained_on(config)]:
        raise CRDError(
            f"alarm.judges: {', '.join(learnt)} is trained on (rewards), so it rises with the reward and cannot tell of hacking. "
            "Name judges of evaluation.judges or held-out ones, or leave alarm.judges out."
        )
    if unknown := [name for name in config.alarm.judges or () if name not in evaluated]:
        raise CRDError(
            f"alarm.judges: {', '.join(unknown)} is not evaluated; evaluated are {', '.join(evaluated)}. "
            "Name one of them, or add it to evaluation.judges."
        )


def check_prompts(rewards: list[NamedReward], train: PromptSet, evaluation: PromptSet) -> None:
    """Raises CRDError if the rewards cannot score the training prompts; warns of held-out prompts that are not held out."""
    check_targets(rewards, train)
    check_applicable(rewards, train)
    warn_of_shared_prompts(train, evaluation)


def check_targets(rewards: list[NamedReward], prompts: PromptSet) -> None:
    """Prompts that give an OCR or GenEval reward nothing to judge end the run before it begins."""
    reading = [reward.name for reward in rewards if isinstance(reward.function, OCRReward)]
    if reading and not any(quoted_target(text) for text in prompts.texts):
        raise CRDError(
            f"prompts.train: no prompt has a word in double quotes, which the reward {reading[0]!r} looks for, "
            f'e.g. a sign that says "STAR". The first prompt is {prompts.texts[0]!r}.'
        )
    for reward in rewards:
        if isinstance(reward.function, GenEvalReward):
            _check_geneval(reward.name, reward.function, prompts)


def _check_geneval(name: str, reward: GenEvalReward, prompts: PromptSet) -> None:
    judged = [(text, entry) for text, entry in zip(prompts.texts, prompts.metadata, strict=True) if "include" in entry]
    if not judged:
        raise CRDError(
            f"prompts.train: no prompt has GenEval metadata (tag, include), which the reward {name!r} needs. "
            f"`crd prompts geneval` writes such a file. The first prompt is {prompts.texts[0]!r}."
        )
    known = _words_of(reward.detector)
    for text, entry in judged:
        try:
            check_metadata(entry)
        except CRDError as error:
            raise CRDError(f"prompts.train: {text!r}: {error}") from None
        clauses = [*entry["include"], *(entry.get("exclude") or ())]
        for key, words in known.items():
            if unknown := [clause[key] for clause in clauses if clause.get(key, words[0]) not in words]:
                raise CRDError(
                    f"prompts.train: {text!r}: the detector of the reward {name!r} knows no {key} {unknown[0]!r}; "
                    f"it knows {', '.join(words)}. Leave such prompts out, or give another detector."
                )


def _words_of(detector: Detector) -> dict[str, tuple[str, ...]]:
    """The values of clauses' keys that a detector can name; nothing of one that is not ours."""
    from crd.nano import world  # here, since the world loads matplotlib
    from crd.nano.detector import NanoDetector
    from crd.nano.judges import NetDetector

    if isinstance(detector, NanoDetector | NetDetector):
        return {"class": tuple(world.SHAPES), "color": tuple(world.COLORS)}
    if "crd.rewards.geneval.mask2former" in sys.modules:  # where it is not loaded, nobody has such a detector
        from crd.rewards.geneval.mask2former import Mask2FormerDetector

        if isinstance(detector, Mask2FormerDetector):
            return {"class": COCO_CLASSES, "color": COLORS}
    return {}


def check_applicable(rewards: list[NamedReward], prompts: PromptSet) -> None:
    """Every prompt must have a reward, or its pictures are drawn for nothing."""
    rows = zip(prompts.texts, prompts.metadata, strict=True)
    bare = [text for text, metadata in rows if not any(reward.applies(text, metadata) for reward in rewards if reward.weight)]
    if bare:
        rules = ", ".join(f"{reward.name} to {reward.applies_to or 'all'}" for reward in rewards)
        raise CRDError(
            f"rewards: none applies to {len(bare)} of {len(prompts)} training prompts, the first is {bare[0]!r}. "
            f"They apply so: {rules}. Drop these prompts or change rewards[].applies_to."
        )
    for reward in rewards:
        if not any(reward.applies(text, metadata) for text, metadata in zip(prompts.texts, prompts.metadata, strict=True)):
            keys = sorted({key for metadata in prompts.metadata for key in metadata})
            raise CRDError(
                f"rewards: {reward.name} applies to no training prompt: its applies_to is {reward.applies_to!r}. Expected "
                f"'quoted' (prompts with a text in double quotes) or a key of the prompts' metadata: {', '.join(keys) or 'none'}."
            )
