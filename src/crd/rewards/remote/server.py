"""The server: refuses early and cheaply, scores one request at a time, and answers a repeated request from memory."""

import asyncio
import hashlib
import hmac
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from crd.rewards.protocol import RewardSet
from crd.rewards.remote.pictures import TooLarge, open_png, unpack
from crd.rewards.remote.wire import JSON_TYPE, VERSION, Item, Result, ScoreAnswer, ScoreRequest, explain


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


class Refused(Exception):
    """A request that gets an error code and one line of text."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


class Answers:
    """Answers by request, also those still being worked out; lives in the event loop, so that it needs no lock."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._tasks: OrderedDict[tuple[str, str], tuple[bytes, asyncio.Task[bytes]]] = OrderedDict()

    async def get(self, key: tuple[str, str], body: bytes, make: Callable[[], bytes]) -> bytes:
        """The answer to this request; ``make`` runs in a thread, and once however often the request comes."""
        digest = hashlib.sha256(body).digest()
        if key not in self._tasks:
            task = asyncio.create_task(asyncio.to_thread(make))
            self._tasks[key] = digest, task
            task.add_done_callback(lambda done: self._settle(key, done))
        known, task = self._tasks[key]
        if known != digest:
            raise Refused(409, "this request_id was used for another request")
        return await asyncio.shield(task)

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
        self._active = 0
        self._scoring = threading.Lock()  # rewards need not be thread-safe, and share one accelerator

    @property
    def ready(self) -> bool:
        return all(name in self.rewards for name in self.expected)

    def authorise(self, header: str) -> None:
        if self._header and not hmac.compare_digest(header.encode("latin-1"), self._header):
            raise Refused(401, "a valid bearer token is needed", {"WWW-Authenticate": "Bearer"})

    @contextmanager
    def slot(self) -> Iterator[None]:
        if self._active >= self.limits.requests:
            raise Refused(429, f"{self._active} requests are being worked on", {"Retry-After": "1"})
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

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
            scores = iter(reward.rewards.score(images, prompts, metadata).parts[name])
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
            return await request.body()  # the HTTP parser cuts it at the length given
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

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": str(error)}, error.status, error.headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> JSONResponse:
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.post("/{name}")
    async def score(name: str, request: Request) -> Response:
        service.authorise(request.headers.get("authorization", ""))
        service.check_name(name)
        with service.slot():
            body = await read_body(request, service.limits)
            wanted = await asyncio.to_thread(parse, body, service.limits)
            answer = await service.answers.get((name, wanted.request_id), body, lambda: service.score(name, wanted))
        return Response(answer, media_type=JSON_TYPE)

    return app


def make_server(service: Service) -> uvicorn.Server:
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
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)
