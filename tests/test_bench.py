"""A suite of real runs on the tiny model: killed, interrupted and gone on with; its report; the statistics."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import write_recipe

from crd.bench import baselines, figures, runner
from crd.bench.baselines import evaluate_baselines, read_baseline
from crd.bench.results import Results, collect, load_results, result_evaluation, run_row, settings_digest, update_data
from crd.bench.runner import Pool, is_finished, start, state, tail
from crd.bench.statistics import T_975, Interval, mean_interval, paired_difference, t_quantile, verdict
from crd.bench.suite import budget_epochs, load_suite, merged, suite_runs, task_config
from crd.errors import CRDError
from crd.log import read_record
from crd.plan.counts import forwards_per_epoch
from crd.recipe import dump_config
from crd.trainer import CRDTrainer

BUDGET = 500
PATIENCE = 300  # seconds, on a machine that is busy with other things
VARIANTS = {"crd": {}, "alone": {"objective": {"policy_weight": 0.0}, "anchor": {"adaptation": "constant"}}}


def write_suite(folder, name="suite", **changes):
    """A suite of the recipe beside it."""
    data = {
        "name": "Tiny",
        "output": str(folder / "out"),
        "seeds": [0, 1],
        "forward_passes": BUDGET,
        "workers": 2,
        "tasks": {"red": {"recipe": "recipes/tiny.yaml"}},
        "variants": VARIANTS,
        "baselines": {"base": 1.0, "base-guided": 4.5},
        "labels": {"crd": "CRD", "alone": "anchor alone", "red": "Red"},
        "sweeps": {"both": ["alone", "crd"]},
        "claims": [{"text": "The reward term matters", "more": "crd", "less": "alone"}],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder):
    """A folder with recipes/tiny.yaml."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "recipes").mkdir()
    write_recipe(
        folder / "recipes", tiny_folder, "tiny", evaluation={"every": 2, "judges": [{"name": "blue"}], "held_out_judges": False}
    )
    return folder


def bench(suite, printed):
    with printed.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "crd", "bench", "run", str(suite)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def wait_until(condition, process, printed):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
        time.sleep(0.02)


def trained(output):
    """Names of the runs that have trained an epoch."""
    return {path.parent for path in output.glob("*/*/*/metrics.jsonl") if '"train"' in path.read_text()}


@pytest.fixture(scope="module")
def finished(home):
    """The suite, at first of one seed: one run is killed, the other interrupted; then run to its end; and what it said."""
    path, printed, output = write_suite(home), home / "first.txt", home / "out"
    first = bench(write_suite(home, "first", seeds=[0]), printed)
    wait_until(lambda: len(trained(output)) == 2, first, printed)
    children = [child for child in psutil.Process(first.pid).children() if "train" in child.cmdline()]
    (killed,) = [child for child in children if child.cmdline()[-1].endswith("crd/seed-0.yaml")]
    for child in children:
        child.suspend()  # so that the other run has epochs left
    killed.kill()
    wait_until(lambda: "failed  " in printed.read_text(), first, printed)
    first.send_signal(signal.SIGINT)
    wait_until(lambda: "Stopping" in printed.read_text(), first, printed)
    for child in set(children) - {killed}:
        child.resume()
    assert first.wait(PATIENCE) == 1
    assert not any(child.is_running() for child in children)
    last = bench(path, home / "last.txt")
    assert last.wait(PATIENCE) == 0, (home / "last.txt").read_text()
    return load_suite(path), (printed.read_text(), (home / "last.txt").read_text()), path


# ------------------------------------------------------------------------------------------------ runs


def test_an_interrupted_suite_says_how_to_go_on_and_then_ends(finished):
    suite, (interrupted, ended), path = finished
    assert "Stopping: each run ends its epoch and saves" in interrupted
    assert "failed    red/crd/seed-0: exit code -9, the end of" in interrupted
    # the other one may have come to its end meanwhile
    assert re.search("[01] of 2 runs are finished; failed: red/crd/seed-0", interrupted)
    assert f"To go on: crd bench run {path.parent / 'first.yaml'}" in interrupted
    assert "4 of 4 runs are finished" in ended
    assert all(is_finished(run) for run in suite_runs(suite))


def test_a_run_of_a_suite_is_what_plain_training_gives_and_a_baseline_is_its_first_evaluation(finished, tmp_path):
    suite, _, _ = finished
    (run,) = [run for run in suite_runs(suite) if run.variant == "crd" and run.seed == 1]
    evaluation = run.config.evaluation.model_copy(update={"before": True})
    CRDTrainer(config=run.config.model_copy(update={"output_dir": tmp_path / "run", "evaluation": evaluation})).train()
    rows = read_record(tmp_path / "run" / "metrics.jsonl")
    base = {row["label"]: row for row in rows if row["kind"] == "evaluation"}
    for name in ("base", "base-guided"):
        stored = read_baseline(suite, "red", name)
        assert stored == pytest.approx({key: base[name][key] for key in stored}, rel=1e-4, abs=1e-6)
    plain = [row for row in rows if not row.get("label", "").startswith("base")]
    benched = read_record(run.folder / "metrics.jsonl")
    assert len(plain) == len(benched) > run.config.train.epochs
    for row in (*plain, *benched):
        row.pop("kind"), row.pop("label", None)
    for a, b in zip(plain, benched, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


def test_the_forward_passes_that_were_made_are_within_half_an_epoch_of_the_budget(finished):
    for run in suite_runs(finished[0]):
        rollout, epochs = run.config.rollout, run.config.train.epochs
        pictures = epochs * rollout.prompts_per_epoch * rollout.group_size
        counted = [row for row in read_record(run.folder / "timing.jsonl") if "rollout" in row][-1]["forwards"]
        made = pictures * rollout.steps + counted + 2 * pictures * run.config.noise.levels  # a backward counts as two
        assert abs(made - BUDGET) <= made / epochs / 2


def test_failures_and_changed_settings_are_reported_and_the_others_go_on(finished, home, crd):
    broken = {"rewards": [{"name": f"{home / 'broken.py'}:broken"}]}
    (home / "broken.py").write_text("def broken(images, prompts, **metadata):\n    raise ValueError('out of order')\n")
    changed = {**VARIANTS["alone"], "train": {"learning_rate": 0.5}}
    variants = {"broken": broken, "crd": {}, "alone": changed}
    suite = write_suite(home, "failing", variants=variants, seeds=[0, 1], overrides={"checkpoint": {"keep": 3}})
    lock = home / "out" / "red" / "broken"
    lock.mkdir()
    with (lock / "seed-1.log").open("ab") as log:  # as a child does that outlives its bench
        fcntl.flock(log, fcntl.LOCK_EX)
        code, printed = crd("bench", "run", suite)
    assert code == 1
    assert "failed    red/broken/seed-0: exit code 2, the end of" in printed and "out of order" in printed
    assert "failed    red/broken/seed-1: another process is at work on this run" in printed
    for seed in (0, 1):
        assert f"failed    red/alone/seed-{seed}:" in printed
    assert "train.learning_rate: 0.001 -> 0.5" in printed
    assert "2 of 6 runs are finished; failed: red/alone/seed-0" in printed
    code, printed = crd("bench", "status", suite)
    assert code == 0 and printed.count("finished") == 2 and "0 of" in printed and "other settings" in printed


def test_a_longer_budget_makes_finished_runs_unfinished_and_a_shorter_one_is_refused(finished, home):
    run = suite_runs(load_suite(write_suite(home, "longer", forward_passes=2 * BUDGET)))[0]
    assert not is_finished(run)
    with pytest.raises(CRDError, match="more than the"):
        is_finished(suite_runs(load_suite(write_suite(home, "shorter", forward_passes=BUDGET // 2)))[0])


def test_a_baseline_of_other_settings_is_refused(finished, home):
    longer = load_suite(write_suite(home, "steps", overrides={"evaluation": {"steps": 5}}))
    with pytest.raises(CRDError, match="other settings"):
        read_baseline(longer, "red", "base")
    rarer = load_suite(write_suite(home, "rarer", overrides={"evaluation": {"every": 3}}))
    assert read_baseline(rarer, "red", "base")


def test_a_bench_that_ends_leaves_no_child(finished, home, monkeypatch):
    suite = load_suite(write_suite(home, "more", seeds=[7]))
    pool = Pool(suite_runs(suite), 1)
    monkeypatch.setattr(pool, "_reap", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.work()
    assert pool.children[0].process.poll() is not None
    child = start(pool.runs[0])  # its lock is gone with it
    child.process.kill()
    child.process.wait()


def test_half_a_summary_is_that_of_an_unfinished_run(finished):
    run = suite_runs(finished[0])[0]
    path, whole = run.folder / "summary.json", (run.folder / "summary.json").read_text()
    path.write_text(whole[: len(whole) // 2])
    assert not is_finished(run) and "epochs" in state(run)
    path.write_text(whole)


def test_a_disk_that_refuses_one_run_does_not_end_the_others(home, tmp_path):
    (tmp_path / "out" / "red").mkdir(parents=True)
    (tmp_path / "out" / "red" / "alone").write_text("a file where the folder should be")
    suite = load_suite(write_suite(home, "refused", output=str(tmp_path / "out"), seeds=[0]))
    pool = Pool([run for run in suite_runs(suite) if run.variant == "alone"], 1)
    assert pool.work() and pool.failed == ["red/alone/seed-0"]


def test_baselines_whose_process_is_killed_are_a_failure_with_a_name(home, tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text("import os\n\n\ndef evaluate(*_):\n    os._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(baselines, "_evaluate", __import__("killed").evaluate)
    suite = load_suite(write_suite(home, "killed", output=str(tmp_path / "out")))
    with pytest.raises(CRDError, match="the baselines of red cannot be evaluated: BrokenProcessPool"):
        evaluate_baselines(suite, "red")


def test_each_run_has_a_gpu_of_its_own_where_there_are_some(home, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,2,9")  # the last is not there
    assert runner.gpus() == ["5", "2"]
    suite = load_suite(write_suite(home, "gpus", workers=None, output=str(home / "none")))
    pool = Pool(suite_runs(suite), suite.workers)
    assert pool.workers == 2
    started = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, env, **rest: started.append(env["CUDA_VISIBLE_DEVICES"]))
    pool._sort()
    pool._fill()
    assert started == ["5", "2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Pool([], None).workers == os.cpu_count()


def test_the_tail_of_a_log_has_the_last_state_of_its_bars(tmp_path):
    (tmp_path / "a.log").write_text("one\n  0%|\r 50%|\r100%|\n\ncrd: it broke\n")
    assert tail(tmp_path / "a.log") == "    one\n    100%|\n    crd: it broke"


# ---------------------------------------------------------------------------------------------- report


def test_a_report_from_the_data_alone_is_that_from_the_folders(finished, home, crd):
    path = finished[2]
    data, figures = home / "docs" / "tiny.jsonl", home / "docs" / "tiny"
    code, printed = crd("bench", "report", path, "--data", data, "--figures", figures)
    assert code == 0, printed
    names = ["curves.png", "differences-red.png", "frontier.png", "judges-red.png", "samples-red.png", "README.md"]
    assert sorted(file.name for file in figures.iterdir()) == sorted(names)
    from_folders = {name: (figures / name).read_bytes() for name in names}
    numbers = data.read_text()
    shutil.move(home / "out", home / "away")
    try:
        for name in names[:3]:
            (figures / name).unlink()
        code, printed = crd("bench", "report", path, "--data", data, "--figures", figures)
        assert code == 0, printed
        assert {name: (figures / name).read_bytes() for name in names} == from_folders
    finally:
        shutil.move(home / "away", home / "out")
    assert data.read_text() == numbers
    changed = load_suite(write_suite(home, "changed", overrides={"train": {"learning_rate": 0.5}}))
    with pytest.raises(CRDError, match="red/crd/seed-0 of other settings"):
        load_results(changed, data)
    of_before = [{key: value for key, value in row.items() if key != "settings"} for row in read_record(data)]
    data.write_text("".join(json.dumps(row) + "\n" for row in of_before))
    assert load_results(changed, data).runs
    for asked in ({"metrics": ["reward", "blu"]}, {"claims": [{"text": "", "more": "crd", "less": "alone", "metric": "blu"}]}):
        with pytest.raises(CRDError, match=r"nothing was measured by 'blu'; there are .*blue"):
            load_results(load_suite(write_suite(home, "metric", **asked)), data)
    assert len(numbers) < 6000


def test_the_tables_hold_the_numbers_of_the_runs(finished, home, tmp_path):
    suite, _, _ = finished
    update_data(suite, tmp_path / "data.jsonl")
    from crd.bench.page import difference_table, page

    results = load_results(suite, tmp_path / "data.jsonl")
    final = {}
    for run in suite_runs(suite):
        rows = [row for row in read_record(run.folder / "metrics.jsonl") if row["kind"] == "evaluation"]
        final[run.variant, run.seed] = rows[-1]["reward"]
    values = [final["crd", 0], final["crd", 1]]
    half = 12.7062 * abs(values[0] - values[1]) / 2  # t for one degree of freedom; s / sqrt(2) is half the range
    text = page(results, [])
    assert f"| CRD | 2 | {sum(values) / 2:.3f} ± {half:.3f} |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| CRD | 2 |")]
    assert row.split(" | ")[-4] == str(suite_runs(suite)[0].config.train.epochs) and " epochs | forward passes |" in text
    base = read_baseline(suite, "red", "base")
    assert f"| base | – | {base['reward']:.3f} | {base['blue']:.3f} |" in text
    gap = [final["alone", seed] - final["crd", seed] for seed in (0, 1)]
    half = 12.7062 * abs(gap[0] - gap[1]) / 2
    row = f"{sum(gap) / 2:+.3f} ± {half:.3f}"
    row = f"**{row}**" if half < abs(sum(gap) / 2) else row
    assert f"| anchor alone | {row} |" in difference_table(results, "red")
    assert "| The reward term matters | Red | reward: CRD - anchor alone |" in text


def test_a_row_has_the_curves_and_the_cost_of_its_run(finished):
    run = suite_runs(finished[0])[0]
    row = run_row(run)
    timing = [r for r in read_record(run.folder / "timing.jsonl") if "rollout" in r]
    seconds = sum(r["rollout"] + r["reward"] + r["train"] for r in timing)
    assert row["seconds"] == pytest.approx(seconds, abs=0.01) == row["training"]["seconds"][-1]
    assert len(row["training"]["reward"]) == row["epochs"] == run.config.train.epochs
    assert row["forwards_per_epoch"] == forwards_per_epoch(run.config)
    assert [e["epoch"] for e in row["evaluations"]] == sorted({*range(2, row["epochs"], 2), row["epochs"]})
    assert {"reward", "blue", "drift", "diversity", "failed", "guidance_scale"} <= row["evaluations"][0].keys()
    assert row["result_epoch"] == row["epochs"]


def test_an_alarm_ends_a_run_before_its_time_and_may_take_it_back(finished):
    run = suite_runs(finished[0])[0]
    path, whole = run.folder / "summary.json", (run.folder / "summary.json").read_text()
    alarm = {"alarms": [{"text": "reward up, judge down"}], "epochs": 2, "rolled_back_to": "epoch-0002"}
    path.write_text(json.dumps({**json.loads(whole), **alarm}))
    row = run_row(run)
    assert result_evaluation(row) == row["evaluations"][0]
    assert not is_finished(run)  # the alarm was to be flagged only
    stopping = run.config.alarm.model_copy(update={"action": "stop"})
    settings = (run.folder / "config.yaml").read_text()
    config = run.config.model_copy(update={"alarm": stopping})
    (run.folder / "config.yaml").write_text(dump_config(config))
    assert is_finished(replace(run, config=config))
    (run.folder / "config.yaml").write_text(settings)
    path.write_text(whole)


def test_data_of_runs_that_are_not_there_is_not_overwritten(finished, home, tmp_path):
    suite, _, _ = finished
    data = tmp_path / "data.jsonl"
    update_data(suite, data)
    before = data.read_text()
    lora = home / "out" / "red" / "alone" / "seed-1" / "pytorch_lora_weights.safetensors"
    lora.rename(lora.with_suffix(".away"))
    with pytest.raises(CRDError, match="red/alone/seed-1"):
        update_data(suite, data)
    assert data.read_text() == before
    lora.with_suffix(".away").rename(lora)
    assert len(collect(suite)) == 6


def test_a_report_of_nothing_says_so(home, tmp_path):
    suite = load_suite(write_suite(home, "empty", output=str(tmp_path / "none")))
    update_data(suite, tmp_path / "data.jsonl")
    with pytest.raises(CRDError, match="nothing to report"):
        load_results(suite, tmp_path / "data.jsonl")


# ----------------------------------------------------------------------------------------------- suite


def test_the_nearer_setting_wins_and_runs_are_seed_by_seed(home):
    suite = load_suite(
        write_suite(
            home,
            "precedence",
            overrides={"evaluation": {"prompts": 1}, "train": {"learning_rate": 0.1, "weight_decay": 0.1, "clip_norm": 0.1}},
            tasks={"red": {"recipe": "recipes/tiny.yaml", "overrides": {"train": {"weight_decay": 0.2, "clip_norm": 0.2}}}},
            variants={"crd": {}, "other": {"train": {"clip_norm": 0.3}}},
            labels={},
            sweeps={},
            claims=[],
        )
    )
    runs = suite_runs(suite)
    assert [run.name for run in runs] == [f"red/{variant}/seed-{seed}" for seed in (0, 1) for variant in ("crd", "other")]
    train = runs[1].config.train
    assert (train.learning_rate, train.weight_decay, train.clip_norm) == (0.1, 0.2, 0.3)
    assert runs[1].config.evaluation.prompts == 1 and runs[1].config.evaluation.pictures_per_prompt == 2
    assert not runs[1].config.evaluation.before and runs[3].config.seed == 1
    assert runs[1].folder == home / "out" / "red" / "other" / "seed-0"
    assert task_config(suite, "red").train.clip_norm == 0.2


def test_merging_replaces_lists_and_leaves_its_arguments_alone():
    tree = {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    assert merged(tree, {"a": {"c": [3]}, "d": {"e": 1}}) == {"a": {"b": 1, "c": [3]}, "d": {"e": 1}}
    assert tree == {"a": {"b": 1, "c": [1, 2]}, "d": 2}


@pytest.mark.parametrize("budget", [200, 1000, 3333])
def test_every_variant_gets_as_near_to_the_budget_as_whole_epochs_allow(home, budget):
    variants = {
        **VARIANTS,
        "unanchored": {"anchor": {"strength": 0.0, "minimum": 0.0}},
        "nft": {"algorithm": "nft"},
        "guided-rollouts": {"rollout": {"guidance_scale": 3.0}},
        "two-pass": {"train": {"micro_batch": 2}},
    }
    runs = suite_runs(load_suite(write_suite(home, "budget", variants=variants, forward_passes=budget, labels={}, sweeps={})))
    for run in runs:
        per_epoch = forwards_per_epoch(run.config)
        assert abs(run.config.train.epochs * per_epoch - budget) <= per_epoch / 2
    with pytest.raises(CRDError, match="less than half an epoch of red/crd"):
        budget_epochs(1, runs[0].config, "red/crd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": [1]}, "seed: there is no such setting. There are: name, output, seeds"),
        ({"tasks": {"red": {"recipes": "x"}}}, "tasks.red.recipes: there is no such setting. There are: recipe, overrides"),
        ({"seeds": []}, "seeds: .* at least 1"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"variants": {"../crd": {}}}, "cannot be the name of a folder"),
        ({"variants": {"baselines": {}}}, "cannot be the name of a folder"),
        ({"variants": {"base": {}}}, "base cannot be both a variant and a baseline"),
        ({"reference": "dpo"}, "reference: there is no dpo; there are crd, alone"),
        ({"labels": {"cdr": "CRD"}}, "labels: there is no cdr"),
        ({"sweeps": {"a": ["crd", "b"]}}, "sweeps.a: there is no b"),
        ({"claims": [{"text": "", "more": "x", "less": "crd"}]}, "claims: there is no x"),
        ({"claims": [{"text": "", "more": "base-guided", "less": "base"}]}, "base-guided and base are both baselines"),
        ({"overrides": {"seed": 3}}, "seed cannot be overridden"),
        ({"forward_passes": "many"}, "forward_passes: .*, got 'many'"),
    ],
)
def test_mistakes_in_a_suite_are_named(home, changes, message):
    with pytest.raises(CRDError, match=message):
        load_suite(write_suite(home, "wrong", **changes))


def test_mistakes_in_settings_name_task_and_variant_and_files_that_are_not_there_are_named(home, crd):
    suite = write_suite(home, "typo", variants={"crd": {"train": {"epoch": 1}}}, labels={}, sweeps={}, claims=[])
    code, printed = crd("bench", "run", suite)
    assert code == 2 and "red/crd: the configuration is not valid" in printed and "train.epoch" in printed
    missing = write_suite(home, "missing", tasks={"red": {"recipe": "recipes/none.yaml"}}, labels={})
    with pytest.raises(CRDError, match=r"there is no recipe .*none\.yaml"):
        suite_runs(load_suite(missing))
    with pytest.raises(CRDError, match="there is no suite"):
        load_suite(home / "nothing.yaml")
    (home / "list.yaml").write_text("- 1\n")
    with pytest.raises(CRDError, match="not valid"):
        load_suite(home / "list.yaml")


# ------------------------------------------------------------------------------------------ statistics


def test_the_quantiles_cut_off_two_and_a_half_percent_of_students_density():
    assert t_quantile(1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-5)
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-5)
    for degrees in range(1, 31):
        factor = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
        x = np.linspace(0, t_quantile(degrees), 20001)
        density = factor * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        area = float((density[1:] + density[:-1]).sum() / 2 * (x[1] - x[0]))
        assert area == pytest.approx(0.475, abs=2e-6)
    assert t_quantile(200) == T_975[-1] > 1.96


def test_intervals_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2.0, 3)
    assert interval.half == pytest.approx(4.30265 / math.sqrt(3))
    assert mean_interval([5.0]) == Interval(5.0, math.inf, 1)


def test_intervals_hold_the_truth_95_times_in_a_hundred():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    intervals = [mean_interval(row.tolist()) for row in draws]
    hits = sum(abs(interval.mean - 3.0) <= interval.half for interval in intervals) / len(intervals)
    assert hits == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors


def test_a_paired_difference_drops_what_the_seeds_share():
    a = {0: 1.0, 1: 5.0, 2: 9.5}
    b = {0: 0.5, 1: 4.0, 2: 8.0, 3: 100.0}
    difference = paired_difference(a, b)
    assert (difference.mean, difference.count) == (1.0, 3)
    assert difference.half == pytest.approx(4.30265 * 0.5 / math.sqrt(3))
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_verdicts_are_decided_by_intervals_that_leave_zero_out():
    assert verdict(Interval(0.2, 0.1, 5)) == "holds"
    assert verdict(Interval(-0.2, 0.1, 5)) == "does not"
    assert verdict(Interval(0.1, 0.2, 5)) == "not decided"
    assert verdict(mean_interval([7.0])) == "not decided"
    assert verdict(None) == "not decided"


def test_alarms_compare_runs_with_the_baselines(home):
    """Runs of a suite do not evaluate the pretrained model; half of the guided baseline's diversity is what counts."""
    from crd.bench.page import alarms

    suite = load_suite(write_suite(home, "alarms", output=str(home / "none")))
    baselines = {
        ("red", "base"): {"reward": 0.3, "diversity": 0.2, "guidance_scale": 1.0},
        ("red", "base-guided"): {"reward": 0.5, "diversity": 0.1, "guidance_scale": 4.5},
    }

    def run(*diversities):
        rows = [{"epoch": 4 * k, "step": 8 * k, "reward": 0.6, "diversity": d} for k, d in enumerate(diversities, 1)]
        return {"evaluations": rows}

    runs = {
        ("red", "crd"): {0: run(0.09, 0.06), 1: run(0.08, 0.051)},
        ("red", "alone"): {0: run(0.09, 0.08), 1: run(0.06, 0.049)},
    }
    said = "\n".join(alarms(Results(suite, runs, baselines)))
    assert "| Red | anchor alone | 1 of 2 | diversity (from epoch 8) |" in said and "CRD" not in said
    assert alarms(Results(suite, {key: runs[key] for key in [("red", "crd")]}, baselines)) == []
    deaf = load_suite(write_suite(home, "deaf", output=str(home / "none"), overrides={"alarm": {"diversity_ratio": 0.0}}))
    assert alarms(Results(deaf, runs, baselines)) == []


def test_figures_show_the_median_of_seconds_and_of_the_frontier_the_sweeps(home, tmp_path, monkeypatch):
    suite = load_suite(write_suite(home, "three", variants={**VARIANTS, "other": {}}, seeds=[0, 1, 2]))

    def run(seconds):
        rows = [{"epoch": 1, "reward": 0.5, "drift": 0.1, "guidance_scale": 1.0}]
        return {"evaluations": rows, "result_epoch": 1, "training": {"seconds": [seconds]}}

    runs = {("red", name): {0: run(200.0), 1: run(1800.0), 2: run(210.0)} for name in suite.variants}
    results = Results(suite, runs, {})
    assert figures._at(results, "red", "crd", 1, figures.BUDGETS["seconds of training"]) == 210
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    figures.frontier(results, tmp_path / "frontier.png")
    figures.frontier(replace(results, suite=suite.model_copy(update={"sweeps": {}})), tmp_path / "frontier.png")
    monkeypatch.undo()
    labels = [figure.axes[0].get_legend_handles_labels()[1] for figure in drawn]
    assert labels == [["CRD", "anchor alone"], ["CRD", "anchor alone", "other"]]
    figures.plt.close("all")


def test_settings_have_one_digest_wherever_the_run_lies(home):
    runs = suite_runs(load_suite(write_suite(home, "digest")))
    elsewhere = runs[0].config.model_copy(update={"output_dir": home / "elsewhere"})
    assert settings_digest(elsewhere) == settings_digest(runs[0].config)
    assert len({settings_digest(run.config) for run in runs}) == len(runs)
