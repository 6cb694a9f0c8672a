"""Rewards of another process or machine over HTTP. See docs/remote-rewards.md for the protocol and what it guards against."""
