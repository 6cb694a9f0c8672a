"""What a run leaves for people: grids, curves, a summary and a model card."""
