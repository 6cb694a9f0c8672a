"""How well the picture's text spells the quoted text of its prompt, read by RapidOCR.

The models come inside the ``rapidocr`` wheel (PP-OCRv6 small); nothing is downloaded. Formula: the one of
Flow-GRPO and DiffusionNFT. Departure: a prompt without a quoted target, or a reader that fails, gives no
score instead of an exception or a silent 0.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crd.errors import CRDError

REC_HEIGHT = 48  # pixels, the height that the recogniser was trained on
LINE_HEIGHT = 128  # pixels; lower pictures are taken to be one line of text, unless told otherwise
MAX_WIDTH_RATIO = 10  # of a recogniser's input, so that a sliver of a picture cannot exhaust memory


def quoted_target(prompt: str) -> str | None:
    """The text between the first two ASCII double quotes, or None."""
    pieces = prompt.split('"')
    return pieces[1] if len(pieces) >= 3 and pieces[1].strip() else None


def levenshtein(a: str, b: str) -> int:
    """Edit distance: insertions, deletions and substitutions cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def spelling_score(recognised: str, target: str) -> float:
    """``1 - distance / len(target)`` in [0, 1]: 1 if the target is a substring, spaces and case ignored."""
    recognised, target = (text.replace(" ", "").lower() for text in (recognised, target))
    if target in recognised:
        return 1.0
    return 1.0 - min(levenshtein(recognised, target), len(target)) / len(target)


def exact_score(recognised: str, target: str) -> float:
    """1 if the recognised text is the target and nothing else, spaces and case ignored."""
    recognised, target = (text.replace(" ", "").lower() for text in (recognised, target))
    return float(recognised == target)


@functools.cache
def _recogniser() -> tuple[Any, list[str]]:
    """The onnxruntime session and its characters (index 0 is CTC's blank)."""
    try:
        import onnxruntime
        import rapidocr
    except ImportError as error:
        raise CRDError(f"the OCR reward needs rapidocr and onnxruntime ({error}): pip install rapidocr onnxruntime") from error
    path = Path(rapidocr.__file__).parent / "models" / "PP-OCRv6_rec_small.onnx"
    if not path.exists():
        raise CRDError(f"the OCR reward expects {path.name} inside the rapidocr package: pip install 'rapidocr>=3.10,<4'")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].splitlines()
    return session, ["", *characters, " "]


@functools.cache
def _detecting_reader() -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise CRDError(f"the OCR reward needs rapidocr ({error}): pip install rapidocr onnxruntime") from error
    return RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False})


def recognise_lines(images: list[Image.Image], width: int) -> list[str]:
    """Reads each picture as one line of text, scaled to ``width`` x 48 pixels."""
    session, characters = _recogniser()
    scaled = [np.asarray(image.convert("RGB").resize((width, REC_HEIGHT), Image.Resampling.BICUBIC)) for image in images]
    batch = np.stack(scaled)[..., ::-1].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0  # BGR, as the model expects
    best = session.run(None, {session.get_inputs()[0].name: batch})[0].argmax(-1)  # (n, steps)
    return ["".join(characters[k] for k, before in zip(row, [0, *row[:-1]], strict=True) if k != before) for row in best]


def read_with_detection(image: Image.Image) -> str:
    """All lines that detection finds, joined without a separator, in reading order."""
    found = _detecting_reader()(np.asarray(image.convert("RGB"))[..., ::-1], use_det=True, use_cls=False, use_rec=True)
    return "".join(found.txts or ())


class OCRReward:
    """Scores pictures against the quoted text of their prompts.

    Args:
        detect: find the text first (any layout, 0.1 to 0.6 s a picture), or read the middle band of the picture
            as one line (5 ms; for pictures that are one centered line, such as the nano world's). None: only
            pictures higher than 128 pixels are searched.
        exact: 1 for exactly the target and nothing else, instead of the edit distance.
    """

    def __init__(self, detect: bool | None = None, exact: bool = False):
        self.detect, self.score = detect, exact_score if exact else spelling_score

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        targets = [quoted_target(prompt) for prompt in prompts]
        texts = self.read(images)
        return [None if target is None else self.score(text, target) for text, target in zip(texts, targets, strict=True)]

    def read(self, images: list[Image.Image]) -> list[str]:
        """The text of each picture."""
        texts: dict[int, str] = {}
        for size in dict.fromkeys(image.size for image in images):  # how a picture is read must not depend on the others
            places = [i for i, image in enumerate(images) if image.size == size]
            texts |= zip(places, self._read([images[i] for i in places]), strict=True)
        return [texts[i] for i in range(len(images))]

    def _read(self, images: list[Image.Image]) -> list[str]:
        """The same of pictures of one size."""
        if images[0].height > LINE_HEIGHT if self.detect is None else self.detect:
            return [read_with_detection(image) for image in images]
        bands = [image.crop((0, image.height // 4, image.width, 3 * image.height // 4)) for image in images]
        # twice as wide as high after the crop: 96 x 48 for a square picture
        width = min(MAX_WIDTH_RATIO, max(1, round(bands[0].width / bands[0].height))) * REC_HEIGHT
        return recognise_lines(bands, width)
