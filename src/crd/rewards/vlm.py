"""A vision-language model as the judge, behind any OpenAI-compatible endpoint (vLLM, SGLang, llama.cpp, hosted ones)."""

import base64
import itertools
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx2
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crd.errors import CRDError
from crd.log import logger
from crd.rewards.remote.access import is_loopback, read_token
from crd.rewards.remote.attempts import Again, Connections, keep_asking, post
from crd.rewards.remote.pictures import encode_png
from crd.rewards.remote.wire import explain

Answer = Literal["score", "probability"]

QUESTIONS: dict[Answer, str] = {
    "score": (
        'This picture was made for the prompt "{prompt}". Judge whether it shows everything that the prompt asks for, and '
        'whether it is well made. Say in one sentence what is wrong, then end with the line "Score: N", where N is a number '
        "from 1 (nothing is right) to 5 (nothing is wrong)."
    ),
    "probability": 'Does this picture show everything that "{prompt}" asks for? Answer with one word, Yes or No.',
}
ALTERNATIVES = 20  # most probable first tokens that are asked for; OpenAI's API takes no more


class VLMOptions(BaseModel):
    """The ``options`` of the reward ``vlm`` in a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    url: str
    """the endpoint's base address, e.g. http://127.0.0.1:8000/v1"""
    model: str
    """name of the model there"""
    answer: Answer = "score"
    """score: a number in the text; probability: P(Yes) / (P(Yes) + P(No)) of the first token, from the endpoint's logprobs"""
    question: str | None = None
    """what is asked about each picture, {prompt} standing for its prompt; none: a question that goes with answer"""
    pattern: str = r"""(?i)score[\s*_:="'`]*(?:\([^()]*\)[\s*_:="'`]*)?(-?\d+(?:\.\d+)?)(?!\w|[.,-]\d)"""
    """of the number, its group 1; the last match in the text counts"""
    lowest: float = 1.0
    """the number that becomes 0 ..."""
    highest: float = 5.0
    """... and the one that becomes 1; a number outside of the two is no score"""
    max_tokens: int = Field(256, ge=1)
    """length of an answer of kind score; one that is cut off there is no score"""
    request: dict[str, Any] = {}
    """further fields of the request, or other values; none removes one: {max_tokens: null, max_completion_tokens: 256}"""
    concurrency: int = Field(8, ge=1)
    """requests at once"""
    timeout: float = Field(60, gt=0)
    """seconds for one attempt"""
    attempts: int = Field(4, ge=1)
    """attempts for each picture that end in 500 or in no answer in time, with growing pauses"""
    deadline: float = Field(600, gt=0)
    """seconds for all pictures of a call, while a busy or absent endpoint is asked again; those unanswered then have no score"""
    key_env: str | None = None
    """environment variable with the API key"""
    key_file: Path | None = None
    """file with the API key, readable by its owner only, instead of a variable"""
    allow_plain_http: bool = False
    """send the key and the pictures unencrypted to another machine"""

    @model_validator(mode="after")
    def _consistent(self) -> "VLMOptions":
        try:
            groups = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if not groups:
            raise ValueError(f"pattern {self.pattern!r} needs a group (...) around the number")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be less than highest ({self.highest})")
        return self


def vlm_reward(**options: Any) -> "VLMReward":
    """The reward of a recipe's entry; raises CRDError for options that are wrong."""
    try:
        return VLMReward(VLMOptions.model_validate(options))
    except ValidationError as error:
        known = ", ".join(VLMOptions.model_fields)
        raise CRDError(f"rewards: the options of vlm are not valid: {explain(error)}. There are: {known}.") from None


class Unreadable(Exception):
    """An answer without a score in it."""


class VLMReward:
    """Asks one question about each picture. Scores are in [0, 1]; a picture without a usable answer has none, never 0.

    The first failure of each kind is logged.
    """

    def __init__(self, options: VLMOptions):
        self.options = options
        self._key = read_token(options.key_file, options.key_env, minimum=1)
        self._address, host = _address(options)
        self._loopback = is_loopback(host)
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._lock = threading.Lock()
        self._told: set[str] = set()  # kinds of failure that are logged already

    def __call__(self, images: list[Image.Image], prompts: list[str], **metadata: list[Any]) -> list[float | None]:
        until, stop, connections = time.monotonic() + self.options.deadline, threading.Event(), Connections()
        limits, hooks = httpx2.Limits(max_connections=self.options.concurrency), {"request": [connections.watch]}
        with (  # proxies of the environment are used, but cannot reach this machine
            httpx2.Client(trust_env=not self._loopback, follow_redirects=False, limits=limits, event_hooks=hooks) as http,
            ThreadPoolExecutor(self.options.concurrency) as pool,
        ):
            try:
                return list(pool.map(lambda image, prompt: self._score(http, image, prompt, until, stop), images, prompts))
            except BaseException:  # Ctrl-C: the requests under way need not go on
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                connections.cut()
                raise

    def _score(self, http: httpx2.Client, image: Image.Image, prompt: str, until: float, stop: threading.Event) -> float | None:
        body = json.dumps(self._request(image, prompt)).encode()
        failures = itertools.count(1)

        def ask(until: float) -> bytes:
            until = min(until, time.monotonic() + self.options.timeout)  # else one byte a second would hold it up
            return post(http, self._address, body, self._headers, self.options.timeout, until)

        def tell(problem: Again) -> None:
            if problem.kind != "failed":
                self._tell(problem.kind, f"{problem}. It is asked again for up to {self.options.deadline:g} s.")
            elif next(failures) >= self.options.attempts:
                raise CRDError(f"no answer in {self.options.attempts} attempts; the last: {problem}")

        try:
            if (rest := until - time.monotonic()) <= 0:
                raise CRDError(f"its turn did not come within the deadline of {self.options.deadline:g} s")
            return read_answer(keep_asking(ask, rest, stop, tell), self.options)
        except Unreadable as error:
            self._tell("unreadable", f"an answer could not be read, its picture has no score: {error}")
        except CRDError as error:
            if not stop.is_set():
                self._tell("failed", f"a request failed, its picture has no score: {error}")
        return None

    def _request(self, image: Image.Image, prompt: str) -> dict[str, Any]:
        options = self.options
        question = (QUESTIONS[options.answer] if options.question is None else options.question).replace("{prompt}", prompt)
        picture = "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        body = {"model": options.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        if options.answer == "probability":
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": ALTERNATIVES}
        else:
            body |= {"max_tokens": options.max_tokens}
        return {key: value for key, value in (body | options.request).items() if value is not None}

    def _tell(self, kind: str, message: str) -> None:
        """Logs the first of each kind; servers may quote the key in what they say."""
        with self._lock:
            if kind in self._told:
                return
            self._told.add(kind)
        logger.warning("reward vlm: %s", message.replace(self._key, "***") if self._key else message)


def _address(options: VLMOptions) -> tuple[str, str]:
    """Where to send questions, and the host."""
    try:
        url = httpx2.URL(options.url)
    except httpx2.InvalidURL as error:
        raise CRDError(f"rewards: vlm: options.url {options.url!r} is no address: {error}") from None
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
        raise CRDError(
            "rewards: vlm: options.url must look like http://127.0.0.1:8000/v1, without password and query, got "
            f"{url.scheme}://{url.host}... A key goes into an environment variable (key_env) or a file (key_file)."
        )
    if url.scheme == "http" and not is_loopback(url.host) and not options.allow_plain_http:
        raise CRDError(
            f"rewards: vlm: options.url {options.url} would send key and pictures unencrypted to another machine. Use https or "
            "an SSH tunnel, or set the option allow_plain_http: true."
        )
    return options.url.rstrip("/") + "/chat/completions", url.host


# ------------------------------------------------------------------------------------------------ answers


class _Token(BaseModel):
    token: str
    logprob: float


class _First(BaseModel):
    top_logprobs: list[_Token]


class _Logprobs(BaseModel):
    content: list[_First] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Completion(BaseModel):
    """What is used of a chat completion."""

    choices: list[_Choice] = Field(min_length=1)


def read_answer(content: bytes, options: VLMOptions) -> float:
    """The score in [0, 1] that a response body holds; raises Unreadable if there is none."""
    try:
        choice = _Completion.model_validate_json(content).choices[0]
    except ValidationError as error:
        raise Unreadable(f"it is no chat completion: {explain(error)}") from None
    if options.answer == "probability":
        return probability_of_yes(choice.logprobs.content if choice.logprobs else None)
    if choice.finish_reason == "length":  # a number in it may be anything but the verdict
        raise Unreadable("it was cut off at max_tokens")
    return number_in(choice.message.content or "", options)


def number_in(text: str, options: VLMOptions) -> float:
    """The last number that the pattern finds, with lowest as 0 and highest as 1."""
    found = [match[1] for match in re.finditer(options.pattern, text)]
    try:
        value = float(found[-1])
    except (IndexError, TypeError, ValueError):
        raise Unreadable(f"no number by the pattern {options.pattern!r} in {text[-200:]!r}") from None
    if not options.lowest <= value <= options.highest:
        raise Unreadable(f"{value:g} is not between {options.lowest:g} and {options.highest:g}")
    return (value - options.lowest) / (options.highest - options.lowest)


def probability_of_yes(tokens: list[_First] | None) -> float:
    """P(Yes) / (P(Yes) + P(No)) of the first token, all spellings of a word together; those that are not listed count as 0."""
    if not tokens:
        raise Unreadable("the endpoint gave no logprobs; use answer: score, or another endpoint")
    mass = {"yes": 0.0, "no": 0.0}
    for entry in tokens[0].top_logprobs:
        word = entry.token.strip().lower()
        if word in mass:
            mass[word] += math.exp(min(entry.logprob, 0.0))
    if not (total := sum(mass.values())) > 0:
        raise Unreadable(f"neither Yes nor No among the first tokens {[entry.token for entry in tokens[0].top_logprobs]}")
    return mass["yes"] / total
