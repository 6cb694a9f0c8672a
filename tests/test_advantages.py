"""Reward normalisation (theory, section 7) against NumPy, and what failed samples do to it: nothing."""

import numpy as np
import pytest
import torch

from crd.advantages import normalise


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
