"""Prompt files that ``crd prompts`` writes: GenEval, and texts to spell."""
