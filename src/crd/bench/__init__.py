"""Comparisons: many runs of one suite, with the same seeds for every method, and their report."""
