"""`crd bench`: run a suite, look at it, report on it."""

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(help="Compare methods: many runs of one suite with the same seeds, and their report.", no_args_is_help=True)

SuiteFile = Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="tasks, variants and seeds, as in benchmarks/suites")]


@bench.command()
def run(
    suite_file: SuiteFile,
    workers: Annotated[int | None, typer.Option(help="runs at once; default: the suite's", min=1)] = None,
) -> None:
    """Run what is not finished yet. The same command again goes on; Ctrl-C lets the runs save."""
    from crd.bench.baselines import evaluate_baselines
    from crd.bench.runner import Pool
    from crd.bench.suite import load_suite, suite_runs
    from crd.errors import CRDError

    suite = load_suite(suite_file)
    pool = Pool(suite_runs(suite), workers or suite.workers)
    for task in suite.tasks:
        try:
            evaluate_baselines(suite, task)
        except CRDError as error:
            typer.echo(f"failed    {task}/baselines: {error}", err=True)
            pool.failed.append(f"{task}/baselines")
    ended = pool.work()
    failures = f"; failed: {', '.join(pool.failed)}" if pool.failed else ""
    typer.echo(f"{len(pool.finished)} of {len(pool.runs)} runs are finished{failures}")
    if not ended:
        typer.echo(f"Stopped. To go on: crd bench run {suite_file}")
    if pool.failed or not ended:
        raise typer.Exit(1)
    typer.echo(f"Next: crd bench report {suite_file}")


@bench.command()
def status(suite_file: SuiteFile) -> None:
    """Say how far every run is."""
    from crd.bench.runner import state
    from crd.bench.suite import load_suite, suite_runs

    for item in suite_runs(load_suite(suite_file)):
        typer.echo(f"{item.name:50}{state(item)}")


@bench.command()
def report(
    suite_file: SuiteFile,
    data: Annotated[Path | None, typer.Option(help="file for the numbers; default: OUTPUT/results.jsonl")] = None,
    figures: Annotated[Path | None, typer.Option(help="folder for README.md and figures; default: OUTPUT/report")] = None,
) -> None:
    """Collect the finished runs into a small data file, and draw tables and figures from that file alone."""
    from crd.bench.page import missing_runs
    from crd.bench.report import write_bench_report
    from crd.bench.suite import load_suite

    suite = load_suite(suite_file)
    folder = figures or suite.output / "report"
    text, results = write_bench_report(suite, data or suite.output / "results.jsonl", folder)
    typer.echo(text)
    if missing := missing_runs(results):
        typer.echo(f"Not finished: {', '.join(missing)}", err=True)
    typer.echo(f"Written: {folder / 'README.md'}", err=True)
