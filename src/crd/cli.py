"""The command line. Heavy imports wait until a command needs them."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crd.bench.cli import bench
from crd.errors import CRDError
from crd.export import Form
from crd.prompt_sets.cli import prompts

if TYPE_CHECKING:
    from crd.config import CRDConfig

app = typer.Typer(
    help="Centered Reward Distillation: fine-tune text-to-image diffusion and flow models with rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
nano = typer.Typer(help="The embedded nano world and its base model.", no_args_is_help=True)
app.add_typer(nano, name="nano")
app.add_typer(bench, name="bench")
app.add_typer(prompts, name="prompts")

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
        from crd.given import as_given
        from crd.plan.lines import plan_lines
        from crd.rewards.named import check_name
        from crd.run_folder import RunFolder

        config = as_given(config, None, None, None, None)
        RunFolder(config.output_dir).open(config, write=False)
        for reward in (*config.rewards, *config.evaluation.judges):
            check_name(reward.name)
        typer.echo(dump_config(config))
        typer.echo("\n".join(plan_lines(config)))
        return
    from crd.trainer import CRDTrainer

    folder = CRDTrainer(config=config).train()
    summary = folder / "summary.json"
    if summary.exists():
        _show(json.loads(summary.read_text()), folder, config)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="a YAML recipe")],
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="plan for this GPU, e.g. h100, rtx-4090; default: this machine")] = None,
    utilisation: Annotated[float, typer.Option(help="share of the GPU's stated speed that is reached", min=0.01, max=1)] = 0.35,
) -> None:
    """Count what a run will cost: parameters, memory by part, operations, time; whether it fits, and which setting to change."""
    from crd.plan.lines import plan_lines
    from crd.recipe import load_config

    typer.echo("\n".join(plan_lines(load_config(recipe, overrides or []), gpu, utilisation)))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    control: Annotated[
        Path | None, typer.Option(help="finished run with objective.policy_weight=0 and the same evaluation, to set beside it")
    ] = None,
) -> None:
    """Write summary, figures and model card of a run again, with a control beside it."""
    from crd.report.result import check_control, write_report
    from crd.run_folder import RunFolder

    folder = RunFolder(run)
    config = folder.config()
    folder.finished(config)
    other = RunFolder(control) if control else None
    if other:
        check_control(config, other)
    _show(write_report(folder, config, other), run, config)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="a finished run, 'nano', a diffusers folder or a hub id")],
    suite: Annotated[list[str] | None, typer.Option(help="geneval, ocr, geneval-nano, ocr-nano; several with commas")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="instead of a suite: prompt file or nano/TASK/SPLIT; default: the run's held-out prompts")
    ] = None,
    reward: Annotated[
        list[str] | None, typer.Option(help="rewards for --prompts, by name; several with commas; default: the run's")
    ] = None,
    judges: Annotated[list[str] | None, typer.Option(help="further scores to show, by name; several with commas")] = None,
    options: Annotated[str, typer.Option(help='options of these scores as JSON, e.g. \'{"ocr": {"detect": true}}\'')] = "{}",
    lora: Annotated[Path | None, typer.Option(help="LoRA file of diffusers, or its folder, to put on the model")] = None,
    count: Annotated[int | None, typer.Option(help="prompts to use, the first ones; default: all", min=1)] = None,
    pictures: Annotated[int, typer.Option(help="pictures per prompt", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="solver steps", min=1)] = 28,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1: none", min=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the pictures")] = 1234,
    batch_size: Annotated[
        int | None, typer.Option(help="pictures drawn and scored together; default: the run's, or 32", min=1)
    ] = None,
    height: Annotated[int | None, typer.Option(help="pixels; default: the run's or the model's", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="as --height", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="folder for metrics.json and a grid of pictures per suite")] = None,
) -> None:
    """Score a model or a run: rewards with 95 % intervals, judges, drift from the guided pretrained model, diversity."""
    from accelerate import PartialState

    from crd.model_source import find_model
    from crd.suite_run import Drawing, evaluate_suites
    from crd.suites import chosen_suites

    source = find_model(model, lora)
    suites = chosen_suites(source.config, _listed(suite), prompts, _listed(reward), _listed(judges), options)
    drawing = Drawing(count, pictures, steps, guidance, seed, batch_size, height, width)
    for scores in evaluate_suites(source, suites, drawing, output):
        if PartialState().is_main_process:
            typer.echo("\n" + "\n".join(scores.table()))


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="a finished run, 'nano', a diffusers folder or a hub id")],
    prompt: Annotated[str, typer.Argument(help="what to draw, e.g. 'a sign that says \"STAR\"'")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file to write")] = Path("sample.png"),
    lora: Annotated[Path | None, typer.Option(help="LoRA file of diffusers, or its folder, to put on the model")] = None,
    count: Annotated[int, typer.Option(help="pictures", min=1)] = 4,
    steps: Annotated[int, typer.Option(help="solver steps", min=1)] = 28,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale; 1: none", min=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="of the pictures")] = 0,
) -> None:
    """Draw pictures with a model or a run."""
    from crd.inference import sample_model

    sample_model(model, lora, prompt, output, count, steps, guidance, seed)
    typer.echo(f"wrote {output}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    to: Annotated[
        Form, typer.Option(help="LoRA file of diffusers; whole pipeline with the tuned weights in it; LoRA file for ComfyUI")
    ],
    output: Annotated[Path | None, typer.Option(help="new folder to write; default: RUN/export/FORM")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="upload to this model repository, made if new")] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private; a public one is refused")] = False,
) -> None:
    """Write the result of a run with its model card, to keep, to give away or to upload."""
    from crd.export.export import export_run

    folder = export_run(run, to, output, push_to_hub, private)
    typer.echo(f"wrote {folder}; its README.md says how to load it" + (f"; uploaded to {push_to_hub}" if push_to_hub else ""))


@app.command()
def settings() -> None:
    """List every setting of a recipe with its default and meaning."""
    from crd.config import CRDConfig
    from crd.recipe import describe

    typer.echo("\n".join(describe(CRDConfig)))


@app.command("serve-reward")
def serve_reward(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="rewards as recipes name them; each is served at /NAME")],
    options: Annotated[str, typer.Option(help='their options as JSON, e.g. \'{"ocr": {"detect": true}}\'')] = "{}",
    host: Annotated[str, typer.Option(help="address to listen on; if not loopback, add --expose and a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0: a free one", min=0, max=65535)] = 8400,
    expose: Annotated[bool, typer.Option("--expose", help="let other machines in")] = False,
    token_file: Annotated[Path | None, typer.Option(help="file with the bearer token, mode 600")] = None,
    token_env: Annotated[str | None, typer.Option(help="environment variable with the bearer token")] = None,
    requests: Annotated[int, typer.Option(help="requests received, waiting or scored at once; more get 429", min=1)] = 8,
) -> None:
    """Score pictures for runs in other processes or on other machines; see docs/remote-rewards.md."""
    from crd.rewards.remote.serve import serve

    serve(names, options, host, port, expose, token_file, token_env, requests)


@app.command("convert-geneval-detector")
def convert_geneval_detector(
    checkpoint: Annotated[Path, typer.Argument(help="mmdetection 2.x's .pth file of GenEval's detector")],
    folder: Annotated[Path, typer.Argument(help="folder to write: the `detector` option of the reward geneval")],
) -> None:
    """Convert the weights of the GenEval benchmark's detector to transformers; see docs/rewards.md."""
    from crd.rewards.geneval.convert_mmdet import convert_checkpoint

    convert_checkpoint(checkpoint, folder)
    typer.echo(f"wrote {folder}")


@nano.command("build")
def nano_build(
    folder: Annotated[Path, typer.Option(help="work folder; the same command goes on from it")] = Path("runs/nano-build"),
    output: Annotated[Path, typer.Option(help="pipeline folder to write")] = Path("runs/nano-build/pipeline"),
    steps: Annotated[int | None, typer.Option(help="optimiser steps of the transformer; default: as shipped")] = None,
    seed: Annotated[int, typer.Option(help="of data and initialisation")] = 0,
) -> None:
    """Pretrain the embedded base model (about 80 minutes on two cores), restartable at any point."""
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


def _listed(values: list[str] | None) -> list[str]:
    """What an option names that can be repeated and can hold several names with commas."""
    return [name.strip() for value in values or [] for name in value.split(",") if name.strip()]


def _show(summary: dict, folder: Path, config: "CRDConfig") -> None:
    """The summary's heart as a table, and where to look."""
    from crd.alarm import held_out

    rows = [("before", "before"), ("before, guided", "before_guided"), ("anchor alone", "anchor_alone"), ("after", "after")]
    typer.echo(f"\n{'on held-out prompts':22}{'guidance':>9}{'reward':>9}{'drift':>9}{'diversity':>11}")
    for name, key in rows:
        if row := summary.get(key):
            typer.echo(f"{name:22}{row['guidance_scale']:9.1f}{row['reward']:9.3f}{row['drift']:9.3f}{row['diversity']:11.3f}")
    judges = [key for key in held_out(config) if key in summary["after"]]
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
