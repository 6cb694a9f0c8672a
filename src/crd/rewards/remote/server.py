"""The server: refuses early and cheaply, scores one request at a time, and answers a repeated request from memory."""

import asyncio
import hashlib
import hmac
import math
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image, PngImagePlugin
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from crd.log import logger
from crd.rewards.protocol import RewardSet
from crd.rewards.remote.pictures import TooLarge, open_png, unpack
from crd.rewards.remote.wire import JSON_TYPE, VERSION, Item, Result, ScoreAnswer, ScoreRequest, explain

PngImagePlugin.MAX_TEXT_MEMORY = 2**20  # bytes of text that a picture may hold unpacked; Pillow unpacks it on opening


@dataclass(frozen=True)
class Limits:
    """What a request may cost; all but the pixels are checked before its body is parsed."""

    body_bytes: int = 128 * 2**20
    body_seconds: float = 60  # to receive the body
    items: int = 64
    picture_pixels: int = 4096 * 4096
    total_pixels: int = 4 * 4096 * 4096
    requests: int = 8  # being received, waiting or scored at once
    remembered: int = 256  # answers kept for requests that are sent again


@dataclass(frozen=True)
class Reward:
    """A reward that is loaded."""

    rewards: RewardSet  # of this one, under its name
    config_hash: str


class Refused(HTTPException):
    """A request that gets an error code, one line of text and maybe headers."""


class Answers:
    """Answers by request, also those still being worked out; lives in the event loop, so that it needs no lock."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._tasks: OrderedDict[tuple[str, str], tuple[bytes, asyncio.Task[bytes]]] = OrderedDict()

    @property
    def running(self) -> int:
        return sum(not task.done() for _, task in self._tasks.values())

    def get(self, key: tuple[str, str], body: bytes, make: Callable[[], bytes]) -> asyncio.Task[bytes]:
        """The answer to this request; ``make`` runs in a thread, and once however often the request comes."""
        digest = hashlib.sha256(body).digest()
        if key not in self._tasks:
            task = asyncio.create_task(asyncio.to_thread(make))
            self._tasks[key] = digest, task
            task.add_done_callback(lambda done: self._settle(key, done))
        known, task = self._tasks[key]
        if known != digest:
            raise Refused(409, "this request_id was used for another request")
        return task

    def _settle(self, key: tuple[str, str], task: asyncio.Task[bytes]) -> None:
        """Forgets what failed, and the oldest answers beyond the capacity."""
        if task.cancelled() or task.exception():
            del self._tasks[key]
        finished = [key for key, (_, task) in self._tasks.items() if task.done()]
        for old in finished[: max(0, len(finished) - self._capacity)]:
            del self._tasks[old]


class Service:
    """The state of a server. ``rewards`` holds what is loaded so far; ``expected`` the names of all."""

    def __init__(self, expected: list[str], token: str | None = None, limits: Limits | None = None):
        self.expected, self.limits = expected, limits or Limits()
        self.rewards: dict[str, Reward] = {}
        self.answers = Answers(self.limits.remembered)
        self._header = f"Bearer {token}".encode() if token else None
        self.closing = False  # nothing more is scored
        self._receiving = 0
        self._scoring = threading.Lock()  # rewards need not be thread-safe, and share one accelerator

    @property
    def ready(self) -> bool:
        return all(name in self.rewards for name in self.expected)

    def authorise(self, header: str) -> None:
        if self._header and not hmac.compare_digest(header.encode("latin-1"), self._header):
            raise Refused(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @property
    def active(self) -> int:
        """Requests being received, waiting or scored; one that was given up and sent again counts once."""
        return self._receiving + self.answers.running

    @contextmanager
    def receiving(self) -> Iterator[None]:
        if self.active >= self.limits.requests:
            raise Refused(429, f"{self.active} requests are being worked on", {"Retry-After": "1"})
        self._receiving += 1
        try:
            yield
        finally:
            self._receiving -= 1

    def check_name(self, name: str) -> None:
        if name not in self.expected:
            raise Refused(404, f"no such reward is served here; there are {', '.join(self.expected)}")
        if name not in self.rewards:
            raise Refused(503, "the reward is being loaded", {"Retry-After": "2"})

    def score(self, name: str, wanted: ScoreRequest) -> bytes:
        """The answer as JSON. Pictures that cannot be read or scored have a status instead of a score."""
        reward = self.rewards[name]
        pictures = decode(wanted.items, self.limits)
        whole = [(picture, item) for picture, item in zip(pictures, wanted.items, strict=True) if picture is not None]
        images, prompts, metadata = [p for p, _ in whole], [i.prompt for _, i in whole], [i.metadata for _, i in whole]
        with self._scoring:
            if self.closing:
                raise Refused(503, "the server is stopping", {"Retry-After": "2"})
            try:
                scores = iter(reward.rewards.score(images, prompts, metadata).parts[name])
            except torch.OutOfMemoryError as error:
                logger.error("reward %s ran out of memory with %d pictures: %s", name, len(images), error)
                raise Refused(413, "out of memory; send fewer pictures") from None
        results = [Result(status="bad_picture", score=None) if p is None else _result(float(next(scores))) for p in pictures]
        answer = ScoreAnswer(
            version=VERSION, request_id=wanted.request_id, model=name, config_hash=reward.config_hash, results=results
        )
        return answer.model_dump_json().encode()


def _result(score: float) -> Result:
    return Result(status="no_score", score=None) if math.isnan(score) else Result(status="ok", score=score)


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body of a request that says what it is and how long; pickles and all else that is not JSON end here, unread."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
        raise Refused(415, f"only {JSON_TYPE} is taken")
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise Refused(411, "Content-Length is needed")
    if int(length) > limits.body_bytes:
        raise Refused(413, f"the body has {length} bytes, at most {limits.body_bytes} are taken; send fewer pictures")
    try:
        async with asyncio.timeout(limits.body_seconds):
            pieces = [piece async for piece in request.stream()]  # the HTTP parser cuts it at the length given
            return b"".join(pieces)  # not request.body(), which keeps it for as long as the answer takes
    except TimeoutError:
        raise Refused(408, f"the body took longer than {limits.body_seconds:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the body was cut short") from None


def parse(body: bytes, limits: Limits) -> ScoreRequest:
    try:
        wanted = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise Refused(422, explain(error)) from None
    if len(wanted.items) > limits.items:
        raise Refused(413, f"{len(wanted.items)} pictures, at most {limits.items} are taken in a request")
    return wanted


def decode(items: list[Item], limits: Limits) -> list[Image.Image | None]:
    """The pictures, None for damaged ones; all sizes are checked before any pixel is unpacked."""
    try:
        opened = [open_png(item.image, limits.picture_pixels) for item in items]
    except TooLarge as error:
        raise Refused(413, str(error)) from None
    total = sum(image.width * image.height for image in opened if image is not None)
    if total > limits.total_pixels:
        raise Refused(413, f"the pictures have {total} pixels, at most {limits.total_pixels} are taken; send fewer pictures")
    return [unpack(image) for image in opened]


def make_app(service: Service) -> FastAPI:
    """``POST /NAME`` scores; ``GET /health``: the process lives; ``GET /ready``: all rewards are loaded."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:  # which is logged, with its traceback
        return JSONResponse({"error": "an error of the server; its output says more"}, 500)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    async def receive(name: str, request: Request) -> asyncio.Task[bytes]:
        """The answer to be waited for, with nothing else of the request kept for that time."""
        with service.receiving():
            body = await read_body(request, service.limits)
            wanted = await asyncio.to_thread(parse, body, service.limits)
            return service.answers.get((name, wanted.request_id), body, lambda: service.score(name, wanted))

    @app.post("/{name}")
    async def score(name: str, request: Request) -> Response:
        service.authorise(request.headers.get("authorization", ""))
        service.check_name(name)
        return Response(await asyncio.shield(await receive(name, request)), media_type=JSON_TYPE)

    return app


class Server(uvicorn.Server):
    """On Ctrl-C or SIGTERM it answers the request being scored, refuses the others and ends; on a second signal at once."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True
        for number in (signal.SIGINT, signal.SIGTERM):  # a thread that scores would hold up any other end
            signal.signal(number, signal.SIG_DFL)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.closing = True
        await super().shutdown(sockets)


def make_server(service: Service) -> Server:
    """Ready to ``run`` on a socket; it logs errors only, and says nothing of itself in headers."""
    config = uvicorn.Config(
        make_app(service),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    return Server(config, service)
