"""The vision-language judge against an endpoint on this machine that answers, and one that misbehaves in every way we know."""

import base64
import io
import json
import math
import os
import signal
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from crd.errors import CRDError
from crd.rewards import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rewards.remote import attempts
from crd.rewards.vlm import Unreadable, VLMOptions, read_answer

KEY = "a-secret-of-enough-letters"


class Endpoint(ThreadingHTTPServer):
    """Answers with ``answer(request) -> (status, body)``, where body is text, bytes, or what writes to the handler."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.requests, self.paths, self.headers = [], [], []
        self.answer = lambda request: (200, completion("Score: 5"))
        self.lock, self.active, self.most_active = threading.Lock(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that have hung up


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        with server.lock:
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            server.paths.append(self.path)
            server.headers.append(self.headers)
        try:
            status, body = server.answer(request)
            if callable(body):
                return body(self)
            body = body if isinstance(body, bytes) else body.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if 300 <= status < 400:
                self.send_header("Location", server.url + "/elsewhere")
            self.end_headers()
            self.wfile.write(body)
        finally:
            with server.lock:
                server.active -= 1


def completion(text, tokens=None):
    """A chat completion; tokens: those of the first place with their probabilities."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if tokens is not None:
        alternatives = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in tokens.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": alternatives}]}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": {"total_tokens": 9}})


@contextmanager
def running(port=0):
    server = Endpoint(port)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def endpoint():
    with running() as server:
        yield server


def judge(endpoint, **options):
    return resolve_reward("vlm", {"url": endpoint.url, "model": "tiny", **options})


def pictures(count):
    return [Image.new("RGB", (8, 8), (10 * i, 0, 0)) for i in range(count)]


def shade(request):
    """The red of a request's picture: 10 times its place."""
    data = request["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))[0]


# ---------------------------------------------------------------------------------------- what is asked


def test_the_request(endpoint):
    reward = judge(endpoint, url=endpoint.url + "/", question='Is "{prompt}" in {it}?', request={"seed": 3, "temperature": None})
    assert reward(pictures(1), ["a {red} cat"]) == [1.0]
    (request,) = endpoint.requests
    assert endpoint.paths == ["/v1/chat/completions"] and "Authorization" not in endpoint.headers[0]
    assert request["model"] == "tiny" and request["seed"] == 3 and request["max_tokens"] == 256
    assert "temperature" not in request and "logprobs" not in request
    image, text = request["messages"][0]["content"]
    assert text == {"type": "text", "text": 'Is "a {red} cat" in {it}?'}
    assert image["type"] == "image_url" and shade(request) == 0


def test_the_probability_asks_for_one_token_and_its_alternatives(endpoint):
    endpoint.answer = lambda request: (200, completion("Yes", {"Yes": 0.5, " yes": 0.1, "No": 0.2, "Maybe": 0.1}))
    assert judge(endpoint, answer="probability")(pictures(1), ["a cat"]) == [pytest.approx(0.6 / 0.8)]
    (request,) = endpoint.requests
    assert (request["max_tokens"], request["logprobs"], request["top_logprobs"], request["temperature"]) == (1, True, 20, 0)
    assert "a cat" in request["messages"][0]["content"][1]["text"]


def test_order_and_concurrency(endpoint):
    """Later pictures are answered first; at most three questions are under way."""

    def answer(request):
        place = shade(request) // 10
        time.sleep(0.04 * (9 - place))
        return 200, completion(f"Score: {1 + place % 5}")

    endpoint.answer = answer
    scores = judge(endpoint, concurrency=3)(pictures(10), [str(i) for i in range(10)])
    assert scores == [i % 5 / 4 for i in range(10)]
    assert endpoint.most_active == 3 and len(endpoint.requests) == 10


def test_no_pictures(endpoint):
    assert judge(endpoint)([], []) == []


# ----------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 1", 0.0),
        ("The cat has five legs.\nScore: 4", 0.75),
        ("Final **Score:** 3/5", 0.5),
        ("score 2.5", 0.375),
        ("Score: 2. On second thoughts, Score: 5", 1.0),
        ("Score: 4/5", 0.75),
        ("**Score**: 4", 0.75),
        ("Score = 4.5", 0.875),
        ("Score: 4.", 0.75),
        ('{"score": 4}', 0.75),
        ("Score (1-5): 4", 0.75),
        ("Score: 1e1", None),
        ("Score: 4,5", None),
        ("Score: 1-5", None),
        ("Score (1-5)", None),
        ("Score: 6", None),
        ("Score: 0", None),
        ("Score: -4", None),
        ("Score: " + "9" * 400, None),
        ("5", None),
        ("I would rather not say.", None),
        ("", None),
    ],
)
def test_numbers(endpoint, text, score):
    endpoint.answer = lambda request: (200, completion(text))
    assert judge(endpoint)(pictures(1), ["a cat"]) == [score]


def test_an_answer_that_was_cut_off_is_no_score(endpoint, caplog):
    """Here the number is of a thought on the way; one token is all that is asked for a probability."""
    cut = completion("Some of it is score 2, but", {"Yes": 1.0}).replace('"stop"', '"length"')
    endpoint.answer = lambda request: (200, cut)
    assert judge(endpoint)(pictures(1), ["a"]) == [None] and "cut off at max_tokens" in caplog.text
    assert judge(endpoint, answer="probability")(pictures(1), ["a"]) == [1.0]


@pytest.mark.parametrize("text", ["Score:" + " " * 10**5, "Score(" * 10**5, "Score: " + "9" * 10**5 + "e"])
def test_long_answers_do_not_hold_it_up(text):
    begun = time.monotonic()
    with pytest.raises(Unreadable):
        read_answer(completion(text).encode(), VLMOptions(url="http://127.0.0.1/v1", model="m"))
    assert time.monotonic() - begun < 5


def test_own_pattern_and_range():
    """As published with UnifiedReward: the number divided by 5."""
    options = VLMOptions(url="http://127.0.0.1/v1", model="m", pattern=r"Final Score:\s*([\d.]+)", lowest=0, highest=5)
    assert read_answer(completion("Final Score: 4").encode(), options) == 0.8


TOKENS = [
    ({"No": 0.9, "Yes": 0.1}, 0.1),
    ({"YES": 1.0}, 1.0),
    ({" no": 1e-9, "The": 0.9}, 0.0),
    ({"Maybe": 1.0}, None),
    ({"Yesterday": 0.5, "Not": 0.5}, None),
    ({}, None),
    (None, None),  # an endpoint without logprobs
]


@pytest.mark.parametrize(("tokens", "score"), TOKENS)
def test_probability_of_yes(endpoint, tokens, score):
    endpoint.answer = lambda request: (200, completion("Yes", tokens))
    (found,) = judge(endpoint, answer="probability")(pictures(1), ["a cat"])
    assert found == (None if score is None else pytest.approx(score))


# -------------------------------------------------------------------------------------------- bad servers


def drip(handler):
    """A byte now and then, for ever."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


NO_SENSE = {
    "garbage": "<html>busy</html>",
    "not UTF-8": b'{"choices": [{"message": {"content": "Score: \xff"}}]}',
    "deeply nested": "[" * 100_000,
    "no choices": json.dumps({"choices": []}),
    "choices of text": json.dumps({"choices": ["Score: 5"]}),
    "choices are no list": json.dumps({"choices": {"message": {"content": "Score: 5"}}}),
    "no message": json.dumps({"choices": [{"text": "Score: 5"}]}),
    "content of parts": json.dumps({"choices": [{"message": {"content": [{"text": "Score: 5"}]}}]}),
    "null content": json.dumps({"choices": [{"message": {"content": None}}]}),
    "an error with status 200": json.dumps({"error": {"message": "out of memory"}}),
    "huge": completion("Score: 5" + " " * 2**20),
}


@pytest.mark.parametrize("body", NO_SENSE.values(), ids=NO_SENSE.keys())
def test_answers_without_sense_are_no_score(endpoint, body, caplog):
    """One picture's nonsense is its own; it is not asked again, since the answer would be the same."""
    endpoint.answer = lambda request: (200, body if shade(request) == 10 else completion("Score: 3"))
    assert judge(endpoint)(pictures(3), ["a"] * 3) == [0.5, None, 0.5]
    assert len(endpoint.requests) == 3
    assert len(caplog.records) == 1 and "has no score" in caplog.text


PASSING = {
    "429": (429, "slow down"),
    "500": (500, "oops"),
    "503": (503, ""),
    "connection closed": (0, hang_up),
    "answer cut short": (0, cut_short),
    "slow": (0, drip),
}


@pytest.mark.parametrize("bad", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_asked_again(endpoint, bad):
    first = threading.Event()

    def answer(request):
        if not first.is_set():
            first.set()
            return bad
        return 200, completion("Score: 5")

    endpoint.answer = answer
    assert judge(endpoint, timeout=1)(pictures(1), ["a"]) == [1.0]
    assert len(endpoint.requests) == 2 and endpoint.requests[0] == endpoint.requests[1]


def test_attempts_are_bounded(endpoint, caplog):
    endpoint.answer = lambda request: (500, "oops") if shade(request) == 0 else (200, completion("Score: 5"))
    assert judge(endpoint, attempts=2)(pictures(2), ["a", "b"]) == [None, 1.0]
    assert len(endpoint.requests) == 3
    assert "2 attempts" in caplog.text and "oops" in caplog.text


def test_slow_answers_are_attempts(endpoint, caplog):
    endpoint.answer = lambda request: (0, drip)
    assert judge(endpoint, attempts=2, timeout=0.2)(pictures(1), ["a"]) == [None]
    assert len(endpoint.requests) == 2 and "2 attempts" in caplog.text


def test_outages_are_no_attempts(endpoint, monkeypatch, caplog):
    """A restart behind a proxy, and two of them: nothing of it is the picture's fault."""
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.01)
    outage = [(502, ""), (503, ""), (0, hang_up), (504, ""), (0, cut_short), (429, "slow down"), (429, "slow down")]
    replies = iter([*outage, (200, completion("Score: 5"))] * 2)
    endpoint.answer = lambda request: next(replies)
    assert judge(endpoint, attempts=1, concurrency=1)(pictures(2), ["a", "b"]) == [1.0, 1.0]
    assert len(endpoint.requests) == 2 * (len(outage) + 1)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and all("asked again for up to 600 s" in text for text in told)  # absent, busy


def test_an_endpoint_that_comes_up_later(monkeypatch):
    monkeypatch.setattr(attempts, "FIRST_WAIT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    scores = []
    reward = resolve_reward("vlm", {"url": f"http://127.0.0.1:{port}/v1", "model": "tiny", "attempts": 1})
    caller = threading.Thread(target=lambda: scores.extend(reward(pictures(3), ["a"] * 3)))
    caller.start()
    time.sleep(0.3)
    with running(port):
        caller.join(20)
    assert scores == [1.0] * 3


def test_an_interruption_waits_for_no_answer(endpoint):
    """Ctrl-C while the endpoint holds two requests and says nothing."""
    let_go = threading.Event()
    endpoint.answer = lambda request: (200, str(let_go.wait(20)))

    def interrupt():
        while len(endpoint.requests) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    begun = time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        judge(endpoint, timeout=15)(pictures(2), ["a", "b"])
    assert time.monotonic() - begun < 5
    let_go.set()


REFUSALS = (400, 401, 404, 301, 307)


@pytest.mark.parametrize("status", REFUSALS)
def test_refusals_and_redirects_are_final(endpoint, status, caplog):
    endpoint.answer = lambda request: (status, "no")
    assert judge(endpoint)(pictures(1), ["a"]) == [None]
    assert endpoint.paths == ["/v1/chat/completions"]  # the key and the picture go nowhere else
    assert f"HTTP {status}" in caplog.text


def test_the_deadline_is_for_all_pictures(endpoint):
    endpoint.answer = lambda request: (0, drip) if shade(request) else (200, completion("Score: 5"))
    begun = time.monotonic()
    assert judge(endpoint, concurrency=1, timeout=20, deadline=1.5)(pictures(4), ["a"] * 4) == [1.0, None, None, None]
    assert time.monotonic() - begun < 6
    assert len(endpoint.requests) == 2  # the others did not get their turn


def test_a_server_that_is_not_there(endpoint, caplog):
    reward = judge(endpoint, url="http://127.0.0.1:9/v1", deadline=0.5)
    assert reward(pictures(2), ["a", "b"]) == [None, None]
    assert len(caplog.records) == 2 and caplog.text.count("ConnectError") == 2  # when it begins, and at the deadline


def test_failures_count_as_failures(endpoint):
    """In a run: NaN and a count, never 0."""
    endpoint.answer = lambda request: (200, completion("no idea") if shade(request) else completion("Score: 1"))
    scores = RewardSet([NamedReward("vlm", judge(endpoint))]).score(pictures(3), ["a"] * 3, [{}, {}, {}])
    assert scores.parts["vlm"][0] == 0 and scores.failures == {"vlm": 2}


# ------------------------------------------------------------------------------------------------- keys


def test_the_key_is_sent_and_never_told(endpoint, monkeypatch, tmp_path, caplog):
    endpoint.answer = lambda request: (401, f"{KEY} is not a key")
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    for source in ({"key_env": "JUDGE_KEY"}, {"key_file": str(file)}):
        reward = judge(endpoint, **source)
        assert reward(pictures(1), ["a"]) == [None]
        assert endpoint.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in caplog.text and "*** is not a key" in caplog.text


@pytest.mark.parametrize("key", ["EMPTY", "flowgrpo", "x"])
def test_keys_are_as_short_as_their_owners_like(endpoint, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    assert judge(endpoint, key_env="JUDGE_KEY")(pictures(1), ["a"]) == [1.0]
    assert endpoint.headers[0]["Authorization"] == f"Bearer {key}"


def test_keys_that_are_none(endpoint, monkeypatch):
    for value in ("", " \n", "two words"):
        monkeypatch.setenv("JUDGE_KEY", value)
        with pytest.raises(CRDError, match="the token in JUDGE_KEY") as caught:
            judge(endpoint, key_env="JUDGE_KEY")
        assert "Make one" not in str(caught.value)


def test_wrong_options(monkeypatch, tmp_path):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    good = {"url": "http://127.0.0.1:8000/v1", "model": "m"}
    for options, message in (
        ({"model": "m"}, "url: Field required"),
        ({**good, "colour": 1}, "colour"),
        ({**good, "answer": "maybe"}, "answer"),
        ({**good, "pattern": "("}, "no regular expression"),
        ({**good, "pattern": "score"}, "needs a group"),
        ({**good, "lowest": 5, "highest": 5}, "less than highest"),
        ({**good, "concurrency": 0}, "concurrency"),
        ({**good, "timeout": float("nan")}, "timeout"),
        ({**good, "url": "localhost:8000"}, "must look like"),
        ({**good, "url": "ftp://localhost/v1"}, "must look like"),
        ({**good, "url": "https://me:hush@host/v1"}, "must look like"),
        ({**good, "url": "http://example.org/v1"}, "unencrypted"),
        ({**good, "key_env": "JUDGE_KEY"}, "JUDGE_KEY"),
        ({**good, "key_file": str(tmp_path / "absent")}, "absent"),
    ):
        with pytest.raises(CRDError, match=message) as caught:
            resolve_reward("vlm", options)
        assert "hush" not in str(caught.value)
    assert resolve_reward("vlm", {**good, "url": "http://example.org/v1", "allow_plain_http": True})
