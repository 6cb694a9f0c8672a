"""Fréchet distance between two sets of features, each summarised as a Gaussian."""

import numpy as np


def square_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric positive semidefinite matrix; rounding below zero counts as zero."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))`` of two Gaussians; means ``(d,)``, covariances ``(d, d)``.

    The trace of ``(A B)^(1/2)`` is that of the symmetric ``(A^(1/2) B A^(1/2))^(1/2)``, the sum of the roots of its
    eigenvalues, which needs no complex arithmetic.
    """
    root = square_root(cov_a)
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between the Gaussians fitted to features ``(n, d)`` and ``(m, d)``, at least two rows each; 0 for equal moments.

    Two finite samples of one distribution do not give 0: the bias falls as 1/n, so compare equal n only.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"expected features (n, d) and (m, d) with n, m >= 2, got {a.shape} and {b.shape}")
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], -1)) for x in (a, b))
    return gaussian_distance(mean_a, cov_a, mean_b, cov_b)
