"""Reward normalisation (theory, section 7) against NumPy, and what failed samples do to it: nothing."""

import numpy as np
import pytest
import torch

from crd.advantages import combine, normalise


def reference(r, k, clip, spread_of):
    r = r.reshape(-1, k)
    deviation = r - r.mean(1, keepdims=True)
    spread = r.std() if spread_of == "rollout" else r.std(1, keepdims=True)
    return (np.clip(deviation / (spread + 1e-4), -clip, clip) / (2 * clip) + 0.5).ravel()


@pytest.mark.parametrize("spread_of", ["rollout", "prompt"])
def test_against_numpy(spread_of):
    r = np.random.default_rng(0).normal(size=20) * 3
    r[3] = 40  # clipped if clip is small
    group = torch.arange(20) // 5
    for clip in (1.0, 5.0):
        got = normalise(torch.tensor(r), group, clip=clip, spread_of=spread_of)
        np.testing.assert_allclose(got.value.numpy(), reference(r, 5, clip, spread_of), atol=1e-9)
        assert got.valid.all()


def test_failed_samples_leave_the_statistics():
    r = torch.tensor([1.0, 2.0, float("nan"), 4.0, 0.0, 0.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    got = normalise(r, group, clip=5.0, spread_of="prompt")
    kept = ~r.isnan()
    expected = normalise(r[kept], group[kept], clip=5.0, spread_of="prompt")
    torch.testing.assert_close(got.value[kept], expected.value)
    assert got.valid.tolist() == [True, True, False, True, True, True]


def test_a_group_with_one_score_left_is_not_used():
    r = torch.tensor([1.0, float("nan"), 3.0, 4.0])
    got = normalise(r, torch.tensor([0, 0, 1, 1]), clip=5.0, spread_of="rollout")
    assert got.valid.tolist() == [False, False, True, True]
    nothing = normalise(torch.full((4,), float("nan")), torch.tensor([0, 0, 1, 1]), clip=5.0, spread_of="rollout")
    assert not nothing.valid.any() and nothing.zero_spread == 1.0


def test_equal_rewards_are_counted_as_zero_spread():
    got = normalise(torch.tensor([0.5, 0.5, 0.1, 0.9]), torch.tensor([0, 0, 1, 1]), clip=5.0, spread_of="rollout")
    assert got.zero_spread == 0.5
    torch.testing.assert_close(got.value[:2], torch.tensor([0.5, 0.5]))


def test_combined_advantages_against_a_loop():
    """Two rewards of very different scales, one of which does not apply everywhere, and one failure."""
    rng = np.random.default_rng(1)
    parts = np.stack([rng.normal(size=12), 1000 * rng.normal(size=12)])
    parts[1, 8:] = np.nan  # the second does not apply to the third prompt
    total = np.nansum(parts, 0)
    total[5] = parts[0, 5] = np.nan  # the first has failed there
    weights, group = [0.5, 2.0], np.arange(12) // 4
    expected = np.zeros(12)
    for part, weight in zip(parts, weights, strict=True):
        known = ~np.isnan(part) & ~np.isnan(total)
        for i in np.flatnonzero(known):
            fellows = part[known & (group == group[i])]
            expected[i] += weight * (part[i] - fellows.mean()) / (part[known].std() + 1e-4)
    expected[5] = np.nan
    got = combine(
        torch.tensor(parts), torch.tensor(weights), torch.tensor(total), torch.from_numpy(group), spread_of="rollout"
    ).numpy()
    np.testing.assert_allclose(got, expected, atol=1e-9)


def test_combining_advantages_does_not_depend_on_a_rewards_scale():
    rng = np.random.default_rng(2)
    parts, group = torch.tensor(rng.normal(size=(2, 12))), torch.arange(12) // 4
    scaled = parts * torch.tensor([[1.0], [1e6]])
    weights = torch.tensor([1.0, 1.0])
    a, b = (combine(p, weights, p.sum(0), group, spread_of="prompt") for p in (parts, scaled))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
