"""The decays of both snapshots against the table in theory, section 5."""

from pathlib import Path

import pytest

from crd.config import CRDConfig
from crd.recipe import build_config, load_config
from crd.schedules import DecaySchedule

PUBLISHED = [
    # (delay, start, slope, end), {step: decay}
    ((0, 0.25, 0.005, 0.999), {0: 0.25, 1: 0.255, 100: 0.75, 149: 0.995, 150: 0.999, 10_000: 0.999}),
    ((75, 0.0, 0.0075, 0.999), {0: 0.0, 75: 0.0, 76: 0.0075, 175: 0.75, 208: 0.9975, 209: 0.999}),
    ((0, 0.25, 0.001, 0.5), {0: 0.25, 100: 0.35, 250: 0.5, 999: 0.5}),
    ((0, 0.0, 0.001, 0.5), {0: 0.0, 499: 0.499, 501: 0.5}),
]


@pytest.mark.parametrize(("row", "expected"), PUBLISHED)
def test_published_rows(row, expected):
    schedule = DecaySchedule(**dict(zip(("delay", "start", "slope", "end"), row, strict=True)))
    for step, decay in expected.items():
        assert schedule(step) == pytest.approx(decay, abs=1e-12)


def test_the_defaults_are_the_published_ocr_recipe():
    config = CRDConfig()
    assert [config.old(s) for s in (0, 100)] == pytest.approx([0.25, 0.75])
    assert [config.sampler(s) for s in (75, 175)] == pytest.approx([0.0, 0.75])


def test_a_constant_is_a_schedule_without_slope():
    assert DecaySchedule(start=0.9, end=0.9)(1000) == 0.9
    assert DecaySchedule(start=0.9)(1000) == 0.9  # an end below the start does not pull it down


def test_one_number_can_be_changed_alone():
    config = build_config({"old": {"slope": 0.01}, "sampler": {"delay": 10}})
    assert [config.old(s) for s in (0, 10, 10_000)] == pytest.approx([0.25, 0.35, 0.999])
    assert [config.sampler(s) for s in (10, 110, 10_000)] == pytest.approx([0.0, 0.75, 0.999])


@pytest.mark.parametrize(("recipe", "rows"), [("sd35-medium-ocr", PUBLISHED[:2]), ("sd35-medium-geneval", PUBLISHED[2:])])
def test_the_recipes_have_the_rows_of_their_task(recipe, rows):
    config = load_config(Path(__file__).parent.parent / "recipes" / f"{recipe}.yaml", [])
    own = [(d.delay, d.start, d.slope, d.end) for d in (config.old, config.sampler)]
    assert own == [row for row, _ in rows]
