"""Objectives: pure functions of velocities, rewards and groups. They draw nothing, gather nothing, log nothing."""
