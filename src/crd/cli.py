"""The command line. Heavy imports wait until a command needs them."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from crd.bench.cli import bench
from crd.errors import CRDError

app = typer.Typer(
    help="Centered Reward Distillation: fine-tune text-to-image diffusion and flow models with rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
nano = typer.Typer(help="The embedded nano world and its base model.", no_args_is_help=True)
app.add_typer(nano, name="nano")
app.add_typer(bench, name="bench")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings that replace the recipe's, e.g. train.learning_rate=1e-3"),
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe; `crd settings` lists every setting with its default")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved settings and the plan, and stop")] = False,
) -> None:
    """Fine-tune a model. The same command again resumes; Ctrl-C saves."""
    from crd.recipe import dump_config, load_config

    config = load_config(recipe, overrides or [])
    if dry_run:
        from crd.plan import plan_lines

        typer.echo(dump_config(config))
        typer.echo("\n".join(plan_lines(config)))
        return
    from crd.trainer import CRDTrainer

    folder = CRDTrainer(config=config).train()
    summary = folder / "summary.json"
    if summary.exists():
        _show(json.loads(summary.read_text()), folder)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    control: Annotated[Path | None, typer.Option(help="run with objective.policy_weight=0, to set beside it")] = None,
) -> None:
    """Write summary, figures and model card of a run again, with a control beside it."""
    from crd.report.result import write_report
    from crd.run_folder import RunFolder

    folder = RunFolder(run)
    config = folder.config()
    if not folder.lora.exists():
        raise CRDError(f"{run} is not finished: it has no {folder.lora.name}. Run `crd train` with its recipe again.")
    other = RunFolder(control) if control else None
    if other:
        other.config()
    _show(write_report(folder, config, other), run)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a finished run, 'nano', a diffusers folder or a hub id")],
    prompts: Annotated[str, typer.Option(help="prompt file or nano/TASK/SPLIT")] = "nano/text/heldout",
    reward: Annotated[list[str] | None, typer.Option(help="rewards to report, by name; repeatable")] = None,
    count: Annotated[int, typer.Option(help="prompts to use, the first ones", min=1)] = 50,
    pictures: Annotated[int, typer.Option(help="pictures per prompt", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="solver steps", min=1)] = 28,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1: none", min=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the pictures")] = 1234,
    output: Annotated[Path | None, typer.Option(help="folder for metrics.json and grid.png")] = None,
) -> None:
    """Score a model or a run on prompts: rewards, drift from the guided pretrained model, diversity."""
    from crd.inference import evaluate_model

    names = reward or ["ocr", "ocr_exact"]
    metrics = evaluate_model(model, prompts, names, count, pictures, steps, guidance, seed, output)
    typer.echo(json.dumps(metrics, indent=1))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="a finished run, 'nano', a diffusers folder or a hub id")],
    prompt: Annotated[str, typer.Argument(help="what to draw, e.g. 'a sign that says \"STAR\"'")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write")] = Path("sample.png"),
    count: Annotated[int, typer.Option(help="pictures", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="solver steps", min=1)] = 28,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1: none", min=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the pictures")] = 0,
) -> None:
    """Draw pictures with a model or a run."""
    from crd.inference import sample_model

    sample_model(model, prompt, output, count, steps, guidance, seed)
    typer.echo(f"wrote {output}")


@app.command()
def settings() -> None:
    """List every setting of a recipe with its default and meaning."""
    from crd.config import CRDConfig
    from crd.recipe import describe

    typer.echo("\n".join(describe(CRDConfig)))


@nano.command("build")
def nano_build(
    folder: Annotated[Path, typer.Option(help="work folder; the same command goes on from it")] = Path("runs/nano-build"),
    output: Annotated[Path, typer.Option(help="pipeline folder to write")] = Path("runs/nano-build/pipeline"),
    steps: Annotated[int | None, typer.Option(help="optimiser steps of the transformer; default: as shipped")] = None,
    seed: Annotated[int, typer.Option(help="of data and initialisation")] = 0,
) -> None:
    """Pretrain the embedded base model (about 2 hours on two cores), restartable at any point."""
    from crd.nano.build import build
    from crd.nano.settings import BuildConfig

    defaults = BuildConfig(seed=seed)
    build(BuildConfig(seed=seed, steps=steps or defaults.steps), folder, output)


@nano.command("card")
def nano_card(
    model: Annotated[str, typer.Option(help="pipeline folder; 'nano' is the embedded one")] = "nano",
    output: Annotated[Path, typer.Option(help="folder for README.md and the grids")] = Path("runs/nano-card"),
) -> None:
    """Measure the base model on 200 held-out prompts and write its model card."""
    from crd.nano.card import write_card

    typer.echo(write_card(model, output))


@nano.command("judges")
def nano_judges(
    output: Annotated[Path, typer.Option(help="folder of the weights; what it holds is not trained again")] = Path(
        "runs/nano-judges"
    ),
    steps: Annotated[int | None, typer.Option(help="optimiser steps of each network; default: as shipped", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of data and initialisation")] = 0,
) -> None:
    """Train the held-out judges of the nano world (about 15 minutes on one core) and measure them."""
    from crd.nano.judges.build import build_judges, judges_config

    typer.echo(json.dumps(build_judges(judges_config(seed, steps), output), indent=1))


def _show(summary: dict, folder: Path) -> None:
    """The summary's heart as a table, and where to look."""
    from crd.alarm import DIRECTED

    rows = [("before", "before"), ("before, guided", "before_guided"), ("anchor alone", "anchor_alone"), ("after", "after")]
    typer.echo(f"\n{'on held-out prompts':22}{'guidance':>9}{'reward':>9}{'drift':>9}{'diversity':>11}")
    for name, key in rows:
        if row := summary.get(key):
            typer.echo(f"{name:22}{row['guidance_scale']:9.1f}{row['reward']:9.3f}{row['drift']:9.3f}{row['diversity']:11.3f}")
    judges = [key for key in DIRECTED if key in summary["after"]]
    if judges:
        typer.echo("\nheld-out judges, never trained on: " + ", ".join(judges))
        for name, key in rows:
            if row := summary.get(key):
                typer.echo(f"{name:22}" + "".join(f"{row[judge]:12.3f}" for judge in judges if judge in row))
    for alarm in summary["alarms"]:
        typer.echo(f"\nHACK ALARM at optimiser step {alarm['step']}: {alarm['text']}")
    typer.echo(
        f"\nPictures: {folder / 'before_after.png'}   curves: {folder / 'curves.png'}   numbers: {folder / 'summary.json'}"
    )
    typer.echo("In plain diffusers (import diffusers):\n  " + "\n  ".join(summary["how_to_load"]))


def main() -> None:
    """Entry point: a mistake of the user is one message and exit code 2, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else: notes about image processors we do not use
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except CRDError as error:
        typer.echo(f"crd: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        typer.echo(f"crd: {error}", err=True)
        sys.exit(2)
