"""The result of a run: the weights, the summary, the figures and the model card."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from crd.alarm import alarm_settings, find_alarms, held_out, students
from crd.batch import PromptGroup
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.export.card import run_card, run_loading_lines
from crd.log import read_record
from crd.models.policy import Policy
from crd.prompt_sets.write import write_atomically
from crd.recipe import differences
from crd.report.figures import before_after, curves
from crd.run_folder import RunFolder

Row = dict[str, Any]


def write_result(folder: RunFolder, config: CRDConfig, policy: Policy, members: list[PromptGroup]) -> None:
    """Writes the student as diffusers loads it, then everything that describes it; all processes call it, the main one writes."""
    partial = folder.path / "partial-result"  # renamed when whole: the result tells a finished run from others
    if PartialState().is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    policy.save(partial)
    if not PartialState().is_main_process:
        return
    _put_in_place(partial, folder.result(config))
    describe_result(folder, config, members)


def forget_result(folder: RunFolder, config: CRDConfig) -> None:
    """Removes the result of fewer epochs, so that a run that goes on does not count as finished."""
    result = folder.result(config)
    if result.is_dir():
        shutil.rmtree(result)
    else:
        result.unlink(missing_ok=True)
    folder.summary.unlink(missing_ok=True)


def save_best(folder: RunFolder, policy: Policy, label: str) -> None:
    """Keeps the student of an evaluation beside those before it; all processes call it, the main one writes."""
    partial = folder.path / "partial-best"
    if PartialState().is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
    policy.save(partial)
    if PartialState().is_main_process:
        shutil.rmtree(folder.best / label, ignore_errors=True)  # of a run that was killed before its checkpoint
        folder.best.mkdir(exist_ok=True)
        partial.replace(folder.best / label)


def forget_others(folder: RunFolder, label: str) -> None:
    """Removes what :func:`save_best` kept of other evaluations than this one; of the main process alone."""
    for kept in folder.best.glob("*"):
        if kept.name != label:
            shutil.rmtree(kept, ignore_errors=True)


def check_best(folder: RunFolder, label: str) -> None:
    """Raises CRDError if the student of an evaluation was not kept."""
    if not (folder.best / label).exists():
        raise CRDError(
            f"the weights of {label} were not kept in {folder.path}: alarm.action was not roll_back then, or alarm.judges were "
            "others. Use alarm.action=stop, which ends the run with its newest weights."
        )


def restore_best(folder: RunFolder, config: CRDConfig, label: str, members: list[PromptGroup]) -> None:
    """The result is then the student that :func:`save_best` kept; of the main process alone."""
    partial = folder.path / "partial-result"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder.best / label, partial)
    _put_in_place(partial, folder.result(config))
    describe_result(folder, config, members)


def _put_in_place(partial: Path, result: Path) -> None:
    if result.is_dir():
        shutil.rmtree(result)
    (partial / result.name).replace(result)
    partial.rmdir()


def describe_result(folder: RunFolder, config: CRDConfig, members: list[PromptGroup]) -> None:
    """Everything that stands beside the weights."""
    prompts = list(dict.fromkeys(member.text for member in members))
    (folder.path / "evaluation_prompts.json").write_text(json.dumps(prompts, indent=1))
    write_report(folder, config)


def check_control(config: CRDConfig, control: RunFolder) -> None:
    """Raises CRDError unless ``control`` is a finished run without the reward term, evaluated as a run with ``config`` was."""
    other = control.config()
    if other.objective.policy_weight:
        raise CRDError(f"--control: {control.path} was trained on the reward. Expected a run with objective.policy_weight=0.")
    control.finished(other)
    decisive = ("model.path", "prompts.evaluation", "rewards", "evaluation.", "anchor.guidance_scale")
    changed = [line for line in differences(config, other) if line.startswith(decisive)]
    if changed := [line for line in changed if not line.startswith("evaluation.before")]:
        raise CRDError(
            f"--control: {control.path} was evaluated otherwise, so its numbers cannot stand beside this run's:\n  "
            + "\n  ".join(changed)
            + "\nGive a run that differs in objective.policy_weight alone."
        )


def write_report(folder: RunFolder, config: CRDConfig, control: RunFolder | None = None) -> Row:
    """Summary, figures and model card from the records; ``control`` is a run with the reward term off, to set beside."""
    rows = read_record(folder.metrics)
    training = [row for row in rows if row["kind"] == "train"]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if not students(evaluations):
        raise CRDError(f"{folder.metrics} holds no evaluation of the student; it is the record that a report is made of.")
    rolled_back = next((row["label"] for row in rows if row["kind"] == "roll_back"), None)
    final = next((row for row in evaluations if row["label"] == rolled_back), students(evaluations)[-1])
    other = students([row for row in read_record(control.metrics) if row["kind"] == "evaluation"]) if control else []
    summary = _summary(folder, config, training, evaluations, other) | {"after": _numbers(final), "rolled_back_to": rolled_back}
    summary["alarms"] = [alarm.as_row() for alarm in find_alarms(evaluations, alarm_settings(config))]
    write_atomically(folder.summary, json.dumps(summary, indent=1) + "\n")
    prompts = json.loads((folder.path / "evaluation_prompts.json").read_text())
    sheets = {"before": folder.pictures / "base.png", "before,\nguided": folder.pictures / "base-guided.png"}
    sheets |= {"after": folder.pictures / f"{final['label']}.png"}
    if control and other:
        sheets["anchor alone"] = control.pictures / f"{other[-1]['label']}.png"
    present = {title: path for title, path in sheets.items() if path.exists()}
    before_after(folder.path / "before_after.png", present, prompts, config.evaluation.pictures_per_prompt, len(prompts))
    curves(folder.path / "curves.png", training, evaluations, other, summary["alarms"], held_out(config))
    (folder.path / "README.md").write_text(run_card(folder, config, summary))
    return summary


def _summary(folder: RunFolder, config: CRDConfig, training: list[Row], evaluations: list[Row], control: list[Row]) -> Row:
    by_label = {row["label"]: _numbers(row) for row in evaluations}
    timing = read_record(folder.timing)
    rollouts = [row for row in timing if "rollout" in row]
    epochs = max(1, len(rollouts))
    summary: Row = {
        "before": by_label.get("base"),
        "before_guided": by_label.get("base-guided"),
        "anchor_alone": _numbers(control[-1]) if control else None,
        "epochs": len(training),
        "optimiser_steps": training[-1]["step"] if training else 0,
        "seconds_per_epoch": {
            part: round(sum(row[part] for row in rollouts) / epochs, 2) for part in ("rollout", "reward", "train")
        },
        "seconds_evaluation": round(sum(row.get("evaluation", 0.0) for row in timing), 1),
        "training_forwards": rollouts[-1]["forwards"] if rollouts else 0,
        "peak_memory_MiB": round(max((row["peak_memory_MiB"] for row in rollouts), default=0)),
        "pictures_per_epoch": config.rollout.prompts_per_epoch * config.rollout.group_size,
        "guidance_of_before_guided": config.reference_guidance,
        "how_to_load": run_loading_lines(folder, config),
    }
    return summary


def _numbers(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("kind", "epoch", "step", "label")}
