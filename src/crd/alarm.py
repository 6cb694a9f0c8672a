"""The hack alarm: a reward that rises while judges that were never trained on fall, or pictures that grow alike.

Pure functions of a run's evaluation rows. Every evaluation draws the same prompts with the same noise, so that two
of them differ by the weights alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

from crd.config import AlarmConfig, CRDConfig

Row = dict[str, Any]

#: judges whose scores say how good a picture is, in [0, 1]; others (saturation ...) only say how it is
DIRECTED = ("tesseract", "geneval_net", "alignment")


@dataclass(frozen=True)
class Alarm:
    """One sign of reward hacking, at one evaluation."""

    label: str  # of the evaluation
    epoch: int
    step: int  # optimiser steps until then
    sign: str  # name of the judge, or "diversity"
    text: str

    def as_row(self) -> Row:
        return asdict(self)


def trained_on(config: CRDConfig) -> set[str]:
    """Names of the rewards that a run learns from."""
    return {reward.name for reward in config.rewards if reward.weight}


def held_out(config: CRDConfig) -> list[str]:
    """The directed judges that are evidence in a run: none that it is trained on."""
    return [name for name in DIRECTED if name not in trained_on(config)]


def alarm_settings(config: CRDConfig) -> AlarmConfig:
    """The alarm's settings with its judges named."""
    named = held_out(config) if config.alarm.judges is None else config.alarm.judges
    return config.alarm.model_copy(update={"judges": tuple(named)})


def watched(rows: list[Row], settings: AlarmConfig) -> list[str]:
    """The judges that the alarm goes by: those of the settings, or all directed ones there are."""
    return [name for name in (DIRECTED if settings.judges is None else settings.judges) if any(name in row for row in rows)]


def students(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["label"].startswith("epoch")]


def find_alarms(rows: list[Row], settings: AlarmConfig) -> list[Alarm]:
    """The alarms of a run, in the order of its evaluations ``rows`` (of the pretrained model and of the student).

    A judge falls if it lies ``judge_fall`` below its best evaluation so far, and the reward rises if it lies
    ``reward_rise`` above what it was there. Diversity is compared with that of the guided pretrained model, which is
    what users of the model see, or of the first evaluation if that was not made.
    """
    base = next((row for row in rows if row["label"] == "base-guided"), rows[0] if rows else None)
    found: list[Alarm] = []
    for index, row in enumerate(rows):
        if not row["label"].startswith("epoch") or base is None:
            continue
        for name in watched(rows, settings):
            best = max((r for r in rows[:index] if name in r and _same_kind(r)), key=lambda r: r[name], default=None)
            if best is None or name not in row:
                continue
            if row[name] < best[name] - settings.judge_fall and row["reward"] > best["reward"] + settings.reward_rise:
                text = (
                    f"the reward rose from {best['reward']:.3f} to {row['reward']:.3f} since {best['label']}, but the judge "
                    f"{name} fell from {best[name]:.3f} to {row[name]:.3f}"
                )
                found.append(_alarm(row, name, text))
        if row["diversity"] < settings.diversity_ratio * base["diversity"]:
            text = (
                f"diversity is {row['diversity']:.3f}, below {settings.diversity_ratio:g} of the {base['diversity']:.3f} of "
                f"{base['label']}"
            )
            found.append(_alarm(row, "diversity", text))
    return found


def _same_kind(row: Row) -> bool:
    """Evaluations to compare the student with: its own, and the model it started as; the guided model is another sampler."""
    return row["label"] != "base-guided"


def _alarm(row: Row, sign: str, text: str) -> Alarm:
    return Alarm(row["label"], row["epoch"], row["step"], sign, text)


def best_evaluation(rows: list[Row], settings: AlarmConfig) -> Row:
    """The student's evaluation with the highest mean of the watched judges; without judges, the one with the highest reward.

    Only evaluations without an alarm of their own count, if there are any. The first of equals wins.
    """
    alarmed = {alarm.label for alarm in find_alarms(rows, settings)}
    own = students(rows)
    sound = [row for row in own if row["label"] not in alarmed] or own
    names = [name for name in watched(rows, settings) if all(name in row for row in sound)] or ["reward"]
    return max(sound, key=lambda row: sum(row[name] for name in names))
