"""GenEval: prompts, rules and reward over any detector."""

from crd.rewards.geneval.detector import Detection, Detector
from crd.rewards.geneval.reward import GenEvalReward
from crd.rewards.geneval.rules import Judgement, Summary, aggregate, judge

__all__ = ["Detection", "Detector", "GenEvalReward", "Judgement", "Summary", "aggregate", "judge"]
