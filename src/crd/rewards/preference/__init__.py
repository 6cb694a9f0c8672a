"""Rewards from published models of human preference, aesthetics and similarity; see docs/rewards.md."""
