"""Ctrl-C: the first one asks for a stop, the second one means it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator


class StopRequest:
    """Whether the run was asked to stop after the epoch it is in; on several processes all of them agree."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Within this scope the first Ctrl-C is a request, the second a KeyboardInterrupt."""

        def handle(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            announce("Stopping after this epoch, with everything saved. Press Ctrl-C again to stop at once.")

        if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
            yield
            return
        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; the same answer on each."""
        votes = accelerator.reduce(torch.tensor([float(self.asked)], device=accelerator.device), "sum")
        self.asked = bool(votes.item() > 0)
        return self.asked
