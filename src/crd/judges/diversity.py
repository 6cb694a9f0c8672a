"""Vendi score: how many clearly different pictures a set amounts to."""

import numpy as np


def vendi_score(features: np.ndarray) -> float:
    """``exp(entropy of the eigenvalues of K / n)``, K the cosine similarities of features ``(n, d)``: from 1 (all alike) to n.

    A row of zeros has no direction; it counts as unlike every other row.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"expected features (n, d) with n >= 1, got {features.shape}")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(norms > 0, norms, 1)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 1.0)
    values = np.linalg.eigvalsh(similarity / len(features))
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def mean_vendi_score(features: np.ndarray, per_prompt: int) -> float:
    """Mean over prompts; rows of features ``(prompts * per_prompt, d)`` are ordered prompt by prompt."""
    if per_prompt < 1 or len(features) % per_prompt or not len(features):
        raise ValueError(f"{len(features)} rows are no whole number of prompts with {per_prompt} pictures each")
    parts = [features[i : i + per_prompt] for i in range(0, len(features), per_prompt)]
    return sum(vendi_score(part) for part in parts) / len(parts)
