"""``crd prompts``. Heavy imports wait until a command needs them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

prompts = typer.Typer(
    help="Write prompt files to train and to test on; the same options give the same bytes.", no_args_is_help=True
)

Split = Annotated[Literal["train", "test"], typer.Option(help="which prompts; no test prompt is among those for training")]
Force = Annotated[bool, typer.Option("--force", help="replace an existing file")]


@prompts.command()
def geneval(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write; default: geneval_SPLIT.jsonl")] = None,
    split: Split = "train",
    size: Annotated[int | None, typer.Option(help="prompts of --split train; default: 50000", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="of the draws of --split train; default: 0")] = None,
    unseen_objects: Annotated[
        bool, typer.Option("--unseen-objects", help="hold out 20 of the 80 classes: train never names them, test nothing else")
    ] = False,
    force: Force = False,
) -> None:
    """GenEval: the published mixture of tasks to train on, or the official 553 prompts to test on."""
    from crd.prompt_sets.write import write_geneval

    path = output or Path(f"geneval_{split}.jsonl")
    _show(write_geneval(path, split, size, seed, unseen_objects, force), path)


@prompts.command()
def ocr(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="file to write; default: ocr_SPLIT.txt")] = None,
    split: Split = "train",
    size: Annotated[int | None, typer.Option(help="prompts; default: 20000 to train, 1000 to test", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    words: Annotated[Path | None, typer.Option(help="file with one word a line; default: some 600 short English words")] = None,
    longest: Annotated[int, typer.Option(help="texts have 1 to so many words, in equal parts", min=1, max=8)] = 3,
    force: Force = False,
) -> None:
    """Texts to spell, in double quotes; a word is either one to train on or one to test on, by its letters alone."""
    from crd.prompt_sets.write import write_ocr

    path = output or Path(f"ocr_{split}.txt")
    _show(write_ocr(path, split, size, seed, words, longest, force), path)


def _show(counts: dict[str, int], path: Path) -> None:
    for kind, count in counts.items():
        typer.echo(f"{kind:15}{count:8,}")
    typer.echo(f"{'together':15}{sum(counts.values()):8,}\nwrote {path}")
