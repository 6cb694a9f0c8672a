"""Rewards by name: the built-in ones, ``package.module:function`` and ``path/to/file.py:function``, or a server's address."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from crd.errors import CRDError
from crd.judges.statistics import background, saturation
from crd.rewards.geneval.reward import GenEvalReward, Output
from crd.rewards.geneval.rules import Mode
from crd.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from crd.rewards.ocr import OCRReward
from crd.rewards.protocol import RewardFunction


def blueness(images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
    """How blue a picture is: mean of ``blue - (red + green) / 2``, from 0 (grey) to 1 (half of full blue or more)."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images]
    return [float(np.clip(2 * (a[..., 2] - a[..., :2].mean(-1)).mean(), 0, 1)) for a in arrays]


def _exact_ocr(detect: bool | None = None) -> RewardFunction:
    return OCRReward(detect=detect, exact=True)


def _blue() -> RewardFunction:
    return blueness


def _geneval(output: Output) -> Callable[..., RewardFunction]:
    def make(mode: Mode = "repaired", detector: str = "nano", **options: Any) -> RewardFunction:
        if detector == "nano":
            from crd.nano.detector import NanoDetector  # here, since the world loads matplotlib

            if options:
                raise CRDError(f"rewards: geneval: the options {options} need a detector that is a hub id or folder, got 'nano'.")
            return GenEvalReward(NanoDetector(), output, mode)
        from crd.rewards.geneval.mask2former import load_detector  # here, since transformers takes seconds to load

        return GenEvalReward(load_detector(detector, **options), output, mode)

    return make


def _vlm(**options: Any) -> RewardFunction:
    from crd.rewards.vlm import vlm_reward  # here, since its HTTP client is of no use to other runs

    return vlm_reward(**options)


def _tesseract(exact: bool = False) -> RewardFunction:
    from crd.judges.tesseract import TesseractReward  # here, since it builds on this package

    return TesseractReward(exact)


def _geneval_net(output: Output = "score", mode: Mode = "repaired") -> RewardFunction:
    from crd.nano.judges import NetDetector, load_detector  # here, since the networks load torch

    return GenEvalReward(NetDetector(load_detector()), output, mode)


def _alignment() -> RewardFunction:
    from crd.nano.judges import AlignmentReward, load_alignment

    return AlignmentReward(load_alignment())


def _saturation() -> RewardFunction:
    return saturation


def _background() -> RewardFunction:
    return background


def _jpeg_compressibility() -> RewardFunction:
    return jpeg_compressibility


def _jpeg_incompressibility() -> RewardFunction:
    return jpeg_incompressibility


def _preference(module: str, reward: str) -> Callable[..., RewardFunction]:
    def make(**options: Any) -> RewardFunction:
        # here, since transformers takes seconds to load
        return vars(importlib.import_module(f"crd.rewards.preference.{module}"))[reward](**options)

    return make


#: name -> what makes the reward from the recipe's ``options``
NAMED_REWARDS: dict[str, Callable[..., RewardFunction]] = {
    "ocr": OCRReward,
    "ocr_exact": _exact_ocr,
    "blue": _blue,
    "geneval": _geneval("score"),
    "geneval_correct": _geneval("correct"),
    "geneval_strict": _geneval("strict"),
    "pickscore": _preference("pickscore", "PickScore"),
    "hpsv2": _preference("hpsv2", "HPSv2"),
    "imagereward": _preference("imagereward", "ImageReward"),
    "aesthetic": _preference("aesthetic", "Aesthetic"),
    "clipscore": _preference("clipscore", "CLIPScore"),
    "vlm": _vlm,
    "jpeg_compressibility": _jpeg_compressibility,
    "jpeg_incompressibility": _jpeg_incompressibility,
    # judges: of other families, never to be trained on
    "tesseract": _tesseract,
    "geneval_net": _geneval_net,
    "alignment": _alignment,
    "saturation": _saturation,
    "background": _background,
}


def check_name(name: str) -> None:
    """Raises CRDError with what is known if a name is none of it; nothing is loaded."""
    if ":" not in name and name not in NAMED_REWARDS:
        known = ", ".join(NAMED_REWARDS)
        raise CRDError(
            f"rewards: {name!r} is not known. Use one of {known}, or 'package.module:function', "
            "or 'file.py:function', or the address of a server, 'http://127.0.0.1:8400/NAME'."
        )


def resolve_reward(name: str, options: dict[str, Any]) -> RewardFunction:
    """The reward that a recipe names; raises CRDError if there is none."""
    check_name(name)
    if name.startswith(("http://", "https://")):
        from crd.rewards.remote.client import remote_reward

        return remote_reward(name, options)
    if ":" in name:
        if options:
            raise CRDError(f"rewards: {name!r} is a plain function and takes no options, got {options}.")
        return _imported(name)
    try:
        return NAMED_REWARDS[name](**options)
    except TypeError as error:
        raise CRDError(f"rewards: the options {options} do not fit {name!r}: {error}") from error


def _imported(name: str) -> RewardFunction:
    where, function = name.rsplit(":", 1)
    try:
        module = _module(where, name)
    except CRDError:
        raise
    except (Exception, SystemExit) as error:
        raise CRDError(f"rewards: {name!r} cannot be imported: {type(error).__name__}: {error}{_place(error)}") from error
    if function not in vars(module):
        raise CRDError(f"rewards: {name!r}: {where} defines no {function}.")
    if not callable(vars(module)[function]):
        raise CRDError(f"rewards: {name!r}: {function} is no function.")
    return vars(module)[function]


def _place(error: BaseException) -> str:
    """The line of the imported file that an exception came through; nothing if the file was not even started."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    theirs = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    inside = [frame for frame in theirs if frame.filename == theirs[0].filename]
    return f" ({inside[-1].filename}, line {inside[-1].lineno})" if inside else ""


def _module(where: str, name: str) -> ModuleType:
    if where.endswith(".py"):
        path = Path(where).expanduser()
        if not path.is_file():
            raise CRDError(f"rewards: {name!r}: there is no file {path.resolve()}.")
        spec = importlib.util.spec_from_file_location(f"crd_reward_{path.stem}", path)
        assert spec and spec.loader
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return module
    if not all(part.isidentifier() for part in where.split(".")):
        raise CRDError(f"rewards: {name!r}: {where!r} is neither a module nor a .py file.")
    return importlib.import_module(where)
