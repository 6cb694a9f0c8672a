"""Schedules as plain functions of the optimiser step."""

from pydantic import BaseModel, ConfigDict, Field


class DecaySchedule(BaseModel):
    """``d(step) = min(start + slope * max(step - delay, 0), end)``: the decay of a snapshot of the student.

    0 copies the student at every step, 1 never moves. Source: theory, section 5.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    delay: int = Field(0, ge=0, description="optimiser steps before the decay starts to rise")
    start: float = Field(0.0, ge=0, le=1, description="decay until then")
    slope: float = Field(0.0, ge=0, description="rise of the decay per optimiser step")
    end: float = Field(0.0, ge=0, le=1, description="the decay rises no further than this")

    def __call__(self, step: int) -> float:
        return max(self.start, min(self.start + self.slope * max(step - self.delay, 0), self.end))
