"""Rewards: plain callables, their composition, and the ones that come with the package."""

from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardFunction, RewardSet, Scores

__all__ = ["NamedReward", "RewardFunction", "RewardSet", "Scores", "resolve_reward"]
