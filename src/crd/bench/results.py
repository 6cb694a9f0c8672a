"""The numbers of a suite: one compact row per finished run and baseline, in a small file that can be committed."""

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from crd.alarm import Alarm, alarm_settings, find_alarms
from crd.bench.baselines import read_baseline
from crd.bench.runner import is_finished
from crd.bench.suite import Run, Suite, suite_runs
from crd.config import CRDConfig
from crd.errors import CRDError
from crd.log import read_record
from crd.run_folder import RunFolder

Row = dict[str, Any]

NOT_METRICS = ("kind", "epoch", "step", "label", "guidance_scale")
TIMES = ("rollout", "reward", "train")  # seconds of an epoch; evaluations are not part of training


@dataclass(frozen=True)
class Results:
    """Rows of a suite by what they belong to."""

    suite: Suite
    runs: dict[tuple[str, str], dict[int, Row]]  # (task, variant) -> seed -> row
    baselines: dict[tuple[str, str], Row]  # (task, baseline) -> metrics

    def metrics(self, task: str) -> list[str]:
        """Metrics of the task, in the suite's order or as measured; a reward that is the whole reward is shown once."""
        rows = [result_evaluation(row) for (name, _), seeds in self.runs.items() if name == task for row in seeds.values()]
        rows += [row for (name, _), row in self.baselines.items() if name == task]
        names = dict.fromkeys(key for row in rows for key in row if key not in NOT_METRICS)
        if self.suite.metrics:
            return [name for name in self.suite.metrics if name in names]
        same = {name for name in names if name != "reward" and all(row.get(name) == row["reward"] for row in rows)}
        idle = {"failed"} if not any(row["failed"] for row in rows) else set()
        return ["reward", *(name for name in names if name not in {"reward"} | same | idle)]

    def final(self, task: str, method: str, metric: str) -> dict[int, float]:
        """The metric after training, by seed; a baseline has its one value with every seed."""
        if (task, method) in self.baselines:
            value: float | None = self.baselines[task, method].get(metric)
            return {} if value is None else dict.fromkeys(self.suite.seeds, value)
        finals = {seed: result_evaluation(row) for seed, row in self.runs.get((task, method), {}).items()}
        return {seed: final[metric] for seed, final in finals.items() if metric in final}

    def alarms(self, run: Run) -> list[Alarm]:
        """The hack alarms of a run. It did not evaluate the pretrained model itself: the suite's baselines stand for that."""
        names = {name: "base" if scale == 1 else "base-guided" for name, scale in self.suite.baselines.items()}
        base = [{**row, "label": names[name]} for (of, name), row in self.baselines.items() if of == run.task]
        own = [{**row, "label": f"epoch-{row['epoch']:04d}"} for row in self.runs[run.task, run.variant][run.seed]["evaluations"]]
        return find_alarms([*base, *own], alarm_settings(run.config))


def result_evaluation(row: Row) -> Row:
    """The evaluation of a run's result: the last one, unless its alarm took it back to an earlier one."""
    return next(evaluation for evaluation in row["evaluations"] if evaluation["epoch"] == row["result_epoch"])


def run_row(run: Run) -> Row:
    """What a report needs of a finished run."""
    from crd.plan.counts import forwards_per_epoch

    folder = RunFolder(run.folder)
    rows = read_record(folder.metrics)
    timing = [row for row in read_record(folder.timing) if "rollout" in row]
    training = [row for row in rows if row["kind"] == "train"]
    seconds = list(accumulate(sum(row[part] for part in TIMES) for row in timing))
    evaluations = [row for row in rows if row["kind"] == "evaluation" and row["label"].startswith("epoch")]
    summary = json.loads(folder.summary.read_text())
    result = summary["rolled_back_to"] or evaluations[-1]["label"]
    rollout = run.config.rollout
    return {
        "kind": "run",
        "task": run.task,
        "variant": run.variant,
        "seed": run.seed,
        "settings": settings_digest(run.config),
        "epochs": len(training),
        "result_epoch": next(row["epoch"] for row in evaluations if row["label"] == result),
        "pictures_per_epoch": rollout.prompts_per_epoch * rollout.group_size,
        "forwards_per_epoch": forwards_per_epoch(run.config),
        "seconds": round(seconds[-1], 2),
        "peak_memory_MiB": round(max(row["peak_memory_MiB"] for row in timing)),
        "evaluations": [_compact(row) for row in evaluations],
        "training": {"reward": [_short(row["reward"]) for row in training], "seconds": [round(s, 2) for s in seconds]},
    }


def settings_digest(config: CRDConfig) -> str:
    """Of a run's settings other than the defaults, so that a setting which is new in crd changes none; without its folder."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def _compact(row: Row) -> Row:
    """The numbers of an evaluation; what could not be measured is left out."""
    kept = {key: value for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}
    return {key: _short(value) for key, value in kept.items()}


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def collect(suite: Suite) -> list[Row]:
    """Rows of all baselines and finished runs that lie in the output folder; raises CRDError for runs of other settings."""
    rows = []
    for task in suite.tasks:
        for name, scale in suite.baselines.items():
            if metrics := read_baseline(suite, task, name):
                own = {"kind": "baseline", "task": task, "name": name, "guidance_scale": scale}
                rows.append({**own, "metrics": _compact(metrics)})
    return rows + [run_row(run) for run in suite_runs(suite) if is_finished(run)]


def update_data(suite: Suite, data: Path) -> None:
    """Writes the rows of the output folder to ``data``; raises CRDError if that would lose runs that it holds."""
    rows = collect(suite)
    if not rows:
        return
    found = {_key(row) for row in rows if row["kind"] == "run"}
    wanted = {(task, variant, seed) for task in suite.tasks for variant in suite.variants for seed in suite.seeds}
    held = {_key(row) for row in read_record(data) if row["kind"] == "run"}
    if lost := sorted((held & wanted) - found):
        names = ", ".join(f"{task}/{variant}/seed-{seed}" for task, variant, seed in lost)
        raise CRDError(
            f"{data} holds runs that are not finished in {suite.output}: {names}. Finish them with `crd bench run`, "
            "give another --data, or remove the file."
        )
    data.parent.mkdir(parents=True, exist_ok=True)
    partial = data.with_name(data.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(data)


def _key(row: Row) -> tuple[str, str, int]:
    return row["task"], row["variant"], row["seed"]


def load_results(suite: Suite, data: Path) -> Results:
    """Reads what :func:`update_data` wrote; rows that are no longer part of the suite are left out."""
    rows = read_record(data)
    runs: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        if (
            row["kind"] == "run"
            and row["task"] in suite.tasks
            and row["variant"] in suite.variants
            and row["seed"] in suite.seeds
        ):
            runs.setdefault((row["task"], row["variant"]), {})[row["seed"]] = row
    found = {(row["task"], row["name"]): row for row in rows if row["kind"] == "baseline"}
    wanted = [(task, name) for task in suite.tasks for name in suite.baselines]
    baselines = {key: {**found[key]["metrics"], "guidance_scale": found[key]["guidance_scale"]} for key in wanted if key in found}
    if not runs:
        raise CRDError(f"there is nothing to report: no run of {suite.output} is finished, and {data} holds none.")
    results = Results(suite, runs, baselines)
    _check_settings(results, data)
    _check_metrics(results)
    return results


def _check_settings(results: Results, data: Path) -> None:
    """Raises CRDError for rows of runs with other settings; rows of before there were digests pass."""
    for run in suite_runs(results.suite):
        row = results.runs.get((run.task, run.variant), {}).get(run.seed, {})
        if row.get("settings") not in (None, settings_digest(run.config)):
            raise CRDError(
                f"{data} holds {run.name} of other settings than the suite's. Run the suite again with another output, "
                "give another --data, or remove the file."
            )


def _check_metrics(results: Results) -> None:
    """Raises CRDError for a metric in the suite that nothing was measured by."""
    rows = [result_evaluation(row) for seeds in results.runs.values() for row in seeds.values()]
    known = dict.fromkeys(key for row in [*rows, *results.baselines.values()] for key in row if key not in NOT_METRICS)
    asked = [("metrics", name) for name in results.suite.metrics]
    for setting, name in [*asked, *(("claims", claim.metric) for claim in results.suite.claims)]:
        if name not in known:
            raise CRDError(f"{setting}: nothing was measured by {name!r}; there are {', '.join(known)}.")
