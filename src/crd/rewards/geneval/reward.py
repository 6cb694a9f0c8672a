"""GenEval as a reward: a detector looks, the rules judge."""

from typing import Any, Literal, get_args

from PIL import Image

from crd.errors import CRDError
from crd.rewards.geneval.detector import Detector
from crd.rewards.geneval.rules import Mode, judge

Output = Literal["score", "correct", "strict"]


class GenEvalReward:
    """Scores pictures against the GenEval metadata of their prompts; no score for prompts without ``include``.

    Args:
        detector: what finds the objects.
        output: ``score`` (partial credit, for training), ``correct`` (the benchmark: 0 or 1) or ``strict``
            (0 or 1, counts exact).
        mode: ``repaired`` or ``reference``, see :mod:`crd.rewards.geneval.rules`.
    """

    def __init__(self, detector: Detector, output: Output = "score", mode: Mode = "repaired"):
        for setting, value, known in (("output", output, get_args(Output)), ("mode", mode, get_args(Mode))):
            if value not in known:
                raise CRDError(f"GenEval reward: {setting} {value!r} is none of {', '.join(known)}.")
        self.detector, self.output, self.mode = detector, output, mode

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        nothing = [None] * len(images)
        tags, includes, excludes = (metadata.get(key, nothing) for key in ("tag", "include", "exclude"))
        judged = [i for i, include in enumerate(includes) if include is not None]
        scores: list[float | None] = [None] * len(images)
        for i, detections in zip(judged, self.detector([images[i] for i in judged]), strict=True):
            wanted = {"tag": tags[i], "include": includes[i], "exclude": excludes[i]}
            judgement = judge(detections, wanted, self.mode)
            scores[i] = float({"score": judgement.score, "correct": judgement.correct, "strict": judgement.strict}[self.output])
        return scores
