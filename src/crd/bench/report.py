"""The report of a suite in a folder: README.md with its figures."""

from pathlib import Path

from crd.bench.figures import draw_figures, draw_samples
from crd.bench.page import page
from crd.bench.results import Results, load_results, update_data
from crd.bench.suite import Suite


def write_bench_report(suite: Suite, data: Path, folder: Path) -> tuple[str, Results]:
    """Collects what the output folder holds into ``data``, then writes everything from ``data`` alone.

    The pictures come from the output folder; without it those that ``folder`` has from before stay.
    """
    update_data(suite, data)
    results = load_results(suite, data)
    figures = draw_figures(results, folder)
    draw_samples(suite, folder)
    figures += [name for task in suite.tasks if (folder / (name := f"samples-{task}.png")).exists()]
    text = page(results, figures)
    (folder / "README.md").write_text(text)
    return text, results
