"""Schedules as plain functions of the optimiser step."""

from pydantic import BaseModel, ConfigDict, Field


class DecaySchedule(BaseModel):
    """``d(step) = max(start, min(start + slope * max(step - delay, 0), end))``: the decay of a snapshot of the student.

    0 copies the student at every step, 1 never moves. An end below the start does nothing. Source: theory, section 5.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    delay: int = Field(0, ge=0, description="optimiser steps before the decay starts to rise")
    start: float = Field(0.0, ge=0, le=1, description="decay until then")
    slope: float = Field(0.0, ge=0, description="rise of the decay per optimiser step")
    end: float = Field(0.0, ge=0, le=1, description="the decay rises no further than this")

    def __call__(self, step: int) -> float:
        return max(self.start, min(self.start + self.slope * max(step - self.delay, 0), self.end))


class OldSchedule(DecaySchedule):
    """Of the moving reference; the defaults are the published numbers, each by itself, so that one can be changed alone."""

    start: float = Field(0.25, ge=0, le=1, description="decay until then")
    slope: float = Field(0.005, ge=0, description="rise of the decay per optimiser step")
    end: float = Field(0.999, ge=0, le=1, description="the decay rises no further than this")


class SamplerSchedule(DecaySchedule):
    """Of the weights that draw rollouts; defaults as published."""

    delay: int = Field(75, ge=0, description="optimiser steps before the decay starts to rise")
    slope: float = Field(0.0075, ge=0, description="rise of the decay per optimiser step")
    end: float = Field(0.999, ge=0, le=1, description="the decay rises no further than this")
