"""Asking a server that may be busy, slow, restarted or gone: what is asked again, when, and for how long."""

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal, TypeVar

import httpx2

from crd.errors import CRDError
from crd.rewards.remote.wire import visible

MAX_ANSWER = 2**20  # bytes
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds between attempts: doubled each time, then shortened at random by up to a half

Kind = Literal["away", "busy", "failed"]
KINDS: dict[int, Kind] = {429: "busy", 500: "failed"}

T = TypeVar("T")


class Again(Exception):
    """An attempt failed in a way that may pass."""

    def __init__(self, reason: str, kind: Kind, wait: float = 0.0):
        super().__init__(reason)
        self.kind = kind  # failed: by an error, or no answer in time, for which the request may be the reason
        self.wait = wait  # seconds, as the server asked for


class Connections:
    """Those of a client, to be cut while other threads wait for answers on them; closing a socket would not wake these."""

    def __init__(self) -> None:
        self._streams: list[Any] = []
        self._cut = False

    def watch(self, request: httpx2.Request) -> None:
        """For the client's ``event_hooks``, at each request."""
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._streams.append(info["return_value"])
            if self._cut:  # this one came too late for the others' end
                self.cut()

    def cut(self) -> None:
        self._cut = True
        for stream in list(self._streams):
            with suppress(OSError):  # closed already
                socket.socket.shutdown(stream.get_extra_info("socket"), socket.SHUT_RDWR)


def keep_asking(ask: Callable[[float], T], deadline: float, stop: threading.Event, tell: Callable[[Again], None]) -> T:
    """``ask(until)`` until it does not raise Again; ``deadline`` in seconds for all attempts together.

    Raises CRDError when the next attempt would come too late, or when ``stop`` is set meanwhile.
    """
    until = time.monotonic() + deadline
    jitter = random.Random()  # of its own: timing must not move anybody's seeded draws
    for attempt in itertools.count(1):
        try:
            return ask(until)
        except Again as problem:
            if stop.is_set():  # and so the line was cut
                break
            backoff = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(attempt - 1, 10)) * jitter.uniform(0.5, 1)
            pause = max(backoff, problem.wait)
            if time.monotonic() + pause > until:
                asked = f" (to be asked again after {problem.wait:g} s)" if problem.wait > backoff else ""
                raise CRDError(f"no answer in {deadline:g} s and {attempt} attempts; the last: {problem}{asked}") from None
            tell(problem)
        if stop.wait(pause):
            break
    raise CRDError("given up, since another request failed")


def post(http: httpx2.Client, address: str, body: bytes, headers: Mapping[str, str], timeout: float, until: float) -> bytes:
    """Sends a request once. Raises Again for what may pass (no connection, 429, 5xx), CRDError for what will not."""
    content = bytearray()
    try:
        patience = min(timeout, max(0.001, until - time.monotonic()))
        with http.stream("POST", address, content=body, headers=headers, timeout=patience) as response:
            for piece in response.iter_raw():  # never unpacked, so that a small answer cannot grow
                content += piece
                if len(content) > MAX_ANSWER:
                    raise CRDError(f"the answer is longer than {MAX_ANSWER} bytes")
                if time.monotonic() > until:
                    raise Again("the answer came too slowly", "failed")
    except httpx2.TransportError as error:
        kind: Kind = "failed" if isinstance(error, httpx2.ReadTimeout) else "away"
        raise Again(f"{type(error).__name__}: {visible(str(error), 500)}", kind) from None
    if response.status_code == 200:
        return bytes(content)
    reason = f"HTTP {response.status_code}: {visible(content.decode('utf-8', 'replace'), 500)}"
    if response.status_code == 429 or response.status_code >= 500:
        asked = response.headers.get("retry-after", "")
        kind = KINDS.get(response.status_code, "away")
        raise Again(reason, kind, float(asked) if asked.isdecimal() else 0.0)
    raise CRDError(reason + (" (redirects are not followed)" if response.is_redirect else ""))
