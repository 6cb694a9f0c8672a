"""Judges: scores that are shown and never trained on, of other families than the rewards."""
