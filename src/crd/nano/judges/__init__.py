"""Judges of the nano world that learned it from its own pictures; no run is trained on them."""

from crd.nano.judges.alignment import AlignmentReward
from crd.nano.judges.detector_net import NetDetector
from crd.nano.judges.load import load_alignment, load_detector
from crd.nano.judges.sets import frechet_to_world, set_judges

__all__ = ["AlignmentReward", "NetDetector", "frechet_to_world", "load_alignment", "load_detector", "set_judges"]
