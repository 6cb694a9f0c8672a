"""Grids of pictures as PNG."""

from pathlib import Path

from PIL import Image

GAP = 2  # pixels between pictures


def save_grid(pictures: list[Image.Image], columns: int, path: Path) -> None:
    """Saves pictures row by row, ``columns`` a row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_column(path: Path, columns: int, rows: int, column: int = 0) -> list[Image.Image]:
    """One column of a grid that :func:`save_grid` wrote."""
    with Image.open(path) as file:
        sheet = file.convert("RGB")
        width, height = (sheet.width - GAP) // columns - GAP, (sheet.height - GAP) // rows - GAP
        left = GAP + column * (width + GAP)
        tops = [GAP + row * (height + GAP) for row in range(rows)]
        return [sheet.crop((left, top, left + width, top + height)) for top in tops]
