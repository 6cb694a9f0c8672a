"""The client: a reward function whose scores come from an ``http(s)://HOST:PORT/NAME`` address."""

import threading
import uuid
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crd.errors import CRDError
from crd.log import logger
from crd.rewards.remote.access import is_loopback, read_token
from crd.rewards.remote.attempts import Again, Connections, keep_asking, post
from crd.rewards.remote.pictures import encode_png
from crd.rewards.remote.wire import JSON_TYPE, VERSION, Item, ScoreAnswer, ScoreRequest, explain, visible


class RemoteOptions(BaseModel):
    """The ``options`` of a remote reward in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    chunk: int = Field(16, ge=1)
    """pictures per request"""
    in_flight: int = Field(2, ge=1)
    """requests at once"""
    timeout: float = Field(60, gt=0)
    """seconds without a sign of life after which an attempt is given up"""
    deadline: float = Field(300, gt=0)
    """seconds for a request with all its attempts; a server may be away for so long"""
    token_file: Path | None = None
    """file with the bearer token, readable by its owner only"""
    token_env: str | None = None
    """environment variable with the bearer token, instead of a file"""
    allow_plain_http: bool = False
    """send the token unencrypted to another machine"""
    config_hash: str | None = None
    """what the server says of its settings must equal this; none: it must stay what it was at first"""


def remote_reward(address: str, options: dict[str, Any]) -> "RemoteReward":
    """The reward of a recipe's entry; raises CRDError for options that are wrong."""
    try:
        return RemoteReward(address, RemoteOptions.model_validate(options))
    except ValidationError as error:
        known = ", ".join(RemoteOptions.model_fields)
        raise CRDError(f"rewards: the options of {address} are not valid: {explain(error)}. There are: {known}.") from None


class RemoteReward:
    """Scores pictures on a server, in chunks with several requests in flight; may be called from several threads.

    Busy, absent and broken servers are asked again until the deadline; refusals and wrong answers end the call at
    once, with a CRDError. Pictures that the server could not score get None.
    """

    def __init__(self, address: str, options: RemoteOptions | None = None):
        self.address, self.options = address, options or RemoteOptions()
        self._headers = {"Content-Type": JSON_TYPE, "Accept-Encoding": "identity"}
        token = read_token(self.options.token_file, self.options.token_env)
        self._check_address(bool(token))
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._tls = httpx2.create_ssl_context(trust_env=False)  # here, since it takes a tenth of a second
        self._lock = threading.Lock()
        self._config_hash = self.options.config_hash
        self._told: set[str] = set()  # kinds of failure that are logged already

    def _check_address(self, token: bool) -> None:
        try:
            url = httpx2.URL(self.address)
        except httpx2.InvalidURL as error:
            raise CRDError(f"rewards: {self.address!r} is no address: {error}") from None
        if not url.host or url.path in ("", "/") or url.userinfo or url.query or url.fragment:
            raise CRDError(f"rewards: {self.address!r} must look like http://127.0.0.1:8400/ocr, without password and query.")
        if token and url.scheme == "http" and not is_loopback(url.host) and not self.options.allow_plain_http:
            raise CRDError(
                f"rewards: {self.address} would send the token unencrypted. Put TLS in front of the server and write https, "
                "or use an SSH tunnel, or set the option allow_plain_http: true."
            )

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        stop = threading.Event()  # set when one request fails for good: the others need not go on
        connections = Connections()
        hooks = {"request": [connections.watch]}

        def score(start: int) -> list[float | None]:
            part = range(start, min(start + self.options.chunk, len(images)))
            rows = [{key: values[i] for key, values in metadata.items() if values[i] is not None} for i in part]
            items = [
                Item(image=encode_png(images[i]), prompt=prompts[i], metadata=row) for i, row in zip(part, rows, strict=True)
            ]
            return self._request(http, items, stop)

        with (
            # no proxies from elsewhere
            httpx2.Client(verify=self._tls, trust_env=False, follow_redirects=False, event_hooks=hooks) as http,
            ThreadPoolExecutor(self.options.in_flight) as pool,
        ):
            futures = [pool.submit(score, start) for start in range(0, len(images), self.options.chunk)]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                connections.cut()
                raise
        return [score for future in futures for score in future.result()]

    def _request(self, http: httpx2.Client, items: list[Item], stop: threading.Event) -> list[float | None]:
        """The scores of one request; all its attempts have one id, so that the server scores it once."""
        request = ScoreRequest(version=VERSION, request_id=uuid.uuid4().hex, items=items)
        body = request.model_dump_json().encode()

        def ask(until: float) -> bytes:
            return post(http, self.address, body, self._headers, self.options.timeout, until)

        def tell(problem: Again) -> None:
            self._tell(problem.kind, f"{problem}. It is asked again for up to {self.options.deadline:g} s.")

        try:
            answer = self._checked(keep_asking(ask, self.options.deadline, stop, tell), request)
        except CRDError as error:
            raise CRDError(f"{self.address}: {error}") from None
        self._told.discard("away")  # the next outage is news again
        return self._scores(answer)

    def _checked(self, content: bytes, request: ScoreRequest) -> ScoreAnswer:
        """The answer, if it is one to this request, and by the reward that answered before."""
        try:
            answer = ScoreAnswer.model_validate_json(content)
        except ValidationError as error:
            raise CRDError(f"the answer is not valid: {explain(error)}") from None
        if answer.request_id != request.request_id:
            raise CRDError(f"the answer is to request {answer.request_id!r}, not to {request.request_id}")
        if len(answer.results) != len(request.items):
            raise CRDError(f"{len(answer.results)} results for {len(request.items)} pictures")
        with self._lock:
            self._config_hash = self._config_hash or answer.config_hash
        if answer.config_hash != self._config_hash:
            raise CRDError(
                f"the server's config_hash is {visible(answer.config_hash, 200)}, expected {self._config_hash}: its reward has "
                "other options, code or versions, so its scores must not be mixed with earlier ones."
            )
        return answer

    def _scores(self, answer: ScoreAnswer) -> list[float | None]:
        for status, count in Counter(result.status for result in answer.results).items():
            if status != "ok":
                self._tell(
                    status, f"{count} of {len(answer.results)} pictures have no score: {status}. The server's log may say why."
                )
        return [result.score for result in answer.results]

    def _tell(self, kind: str, message: str) -> None:
        """Logs the first of each kind."""
        with self._lock:
            if kind in self._told:
                return
            self._told.add(kind)
        logger.warning("reward %s: %s", self.address, message)
