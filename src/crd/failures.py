"""What may fail in a run without ending it, and how much of it."""

import math

from crd.errors import CRDError
from crd.log import logger

MAX_SKIPPED = 3  # optimiser steps in a row with a non-finite gradient before the run stops


def check_failures(share: float, where: str, failures: dict[str, int], limit: float) -> None:
    """Raises CRDError if more than ``limit`` of the pictures got no reward; logs it if fewer did not."""
    if share == 0:
        return
    named = ", ".join(f"{name}: {count}" for name, count in failures.items() if count)
    what = f"{share:.1%} of the pictures of {where} got no reward" + (f" ({named})" if named else "")
    logger.warning("%s", what)
    if share > limit:
        raise CRDError(
            f"{what}; reward_failure_limit is {limit:.1%}. The first failures are logged above. Mend the reward and run the "
            "same command again: it goes on from the newest checkpoint."
        )


class SkippedSteps:
    """Counts optimiser steps in a row whose gradient is not finite."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def count(self, gradient_norm: float, step: int, learning_rate: float) -> None:
        """Raises CRDError at the last one that is borne."""
        finite = math.isfinite(gradient_norm)
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if not finite:
            logger.warning("optimiser step %d skipped: its gradient is not finite", step)
        if self._in_a_row == MAX_SKIPPED:
            raise CRDError(
                f"{MAX_SKIPPED} optimiser steps in a row had no finite gradient; the last checkpoint is untouched. "
                f"Try a lower train.learning_rate than {learning_rate} or model.precision=float32."
            )
