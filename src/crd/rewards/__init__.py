"""Rewards: plain callables, their composition, and the ones that come with the package."""

from crd.rewards.named import resolve_reward
from crd.rewards.protocol import RewardFunction, RewardSet, Scores

__all__ = ["RewardFunction", "RewardSet", "Scores", "resolve_reward"]
