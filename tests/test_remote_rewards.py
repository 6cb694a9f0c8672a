"""Rewards over HTTP: the scores of the reward itself, on the real server; and what bad servers, clients and luck may not do."""

import base64
import io
import json
import logging
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_pipeline

from crd.errors import CRDError
from crd.log import read_record
from crd.nano import world
from crd.prompts import load_prompts
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rewards.remote import attempts
from crd.rewards.remote.access import is_loopback
from crd.rewards.remote.client import RemoteOptions, RemoteReward
from crd.rewards.remote.pictures import encode_png
from crd.rewards.remote.serve import make_offers
from crd.rewards.remote.server import Limits, Reward, Service, make_server
from crd.trainer import CRDTrainer

TOKEN = "a-token-of-more-than-16-characters"


def first_byte(images, prompts, **metadata):
    """Tells pictures apart: the red of the first pixel."""
    return [float(image.getpixel((0, 0))[0]) for image in images]


def pictures(count):
    return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]


@contextmanager
def serving(port=0, token=None, limits=None, loaded=True, **rewards):
    """``with serving(name=function) as (address, service)``: the real server on a socket, in a thread."""
    service = Service(list(rewards), token, limits)
    if loaded:
        for name, function in rewards.items():
            service.rewards[name] = Reward(RewardSet([NamedReward(name, function)]), "hash-of-" + name)
    server = make_server(service)
    with socket.create_server(("127.0.0.1", port)) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join()


def client(address, **options):
    return RemoteReward(address, RemoteOptions(**{"deadline": 5, **options}))


def message(count=1, **changes):
    """A request as another program would write it."""
    items = [{"image": base64.b64encode(encode_png(image)).decode(), "prompt": "a"} for image in pictures(count)]
    return {"version": 1, "request_id": uuid.uuid4().hex, "items": items, **changes}


def with_picture(data):
    return message(items=[{"image": base64.b64encode(data).decode(), "prompt": "a"}])


def post(address, content, **headers):
    """Status and what was said, after one request."""
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    with httpx2.Client(trust_env=False) as http:
        answer = http.post(address, content=content, headers={"Content-Type": "application/json", **headers})
    return answer.status_code, answer.json()


# ----------------------------------------------------------------------------------------- the same scores as here


def nano_pictures(source, count):
    """Prompts of the nano world with pictures of them, some of them noisy so that scores differ."""
    prompts, rng = load_prompts(source).first(count), random.Random(3)
    images = [world.render(world.Prompt(p.text, p.metadata), rng) for p in prompts]
    noise = np.random.default_rng(3)
    noisy = [np.asarray(image) + noise.integers(0, 90, (64, 64, 3)) * (i % 3) for i, image in enumerate(images)]
    return [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in noisy], prompts


@pytest.mark.parametrize(
    ("name", "source"), [("blue", "nano/colors/heldout"), ("ocr", "nano/text/heldout"), ("geneval", "nano/geneval/heldout")]
)
def test_scores_are_those_of_the_reward_itself(name, source):
    images, prompts = nano_pictures(source, 12)
    images[6:] = images[5:-1]  # of other prompts
    given = images, [p.text for p in prompts], [p.metadata for p in prompts]
    local = RewardSet([NamedReward("r", resolve_reward(name, {}))]).score(*given)
    with serving(**{name: resolve_reward(name, {})}) as (address, _):
        remote = RewardSet([NamedReward("r", resolve_reward(f"{address}/{name}", {"chunk": 5, "in_flight": 3}))]).score(*given)
    assert remote.total.tobytes() == local.total.tobytes()
    assert len(set(local.total)) > 2 and not np.isnan(local.total).any()


def test_a_run_is_the_same_with_its_reward_elsewhere(tmp_path):
    def rewards_of(name):
        config = tiny_config(tmp_path / name.replace("/", "-"), rewards=[{"name": name}], train={"epochs": 1})
        folder = CRDTrainer(tiny_pipeline(), config=config).train()
        return [row["reward"] for row in read_record(folder / "metrics.jsonl")]

    with serving(blue=resolve_reward("blue", {})) as (address, _):
        assert rewards_of(f"{address}/blue") == rewards_of("blue")


def test_order_and_metadata_survive_chunks_and_threads():
    at_work = threading.Lock()

    def odd(images, prompts, **metadata):
        assert at_work.acquire(blocking=False)  # the server lets no two in
        time.sleep(0.02 * (3 - images[0].getpixel((0, 0))[0] % 4))  # later chunks are done earlier
        at_work.release()
        rows = zip(images, prompts, metadata["deep"], metadata.get("rare", [None] * len(images)), strict=True)
        return [
            image.getpixel((0, 0))[0] + 1000 * (prompt == "é") + deep["x"][0] + (rare or 0) for image, prompt, deep, rare in rows
        ]

    images, prompts = pictures(11), ["é", *"bcdefghijk"]
    metadata = {"deep": [{"x": [i / 3]} for i in range(11)], "rare": [None] * 10 + [0.5]}
    expected = odd(images, prompts, **metadata)
    limits = Limits(requests=100)
    with serving(odd=odd, limits=limits) as (address, _):
        reward, answers = client(f"{address}/odd", chunk=2, in_flight=4), {}
        callers = [
            threading.Thread(target=lambda i=i: answers.update({i: reward(images, prompts, **metadata)})) for i in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert answers == dict.fromkeys(range(3), expected)


def test_no_pictures_no_request():
    assert client("http://127.0.0.1:1/none")([], []) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels_survive(mode):
    seen = []

    def look(images, prompts):
        seen.extend(images)
        return [0.0] * len(images)

    channels = len(Image.new(mode, (1, 1)).getbands())
    image = Image.frombytes(mode, (7, 5), np.random.default_rng(0).bytes(35 * channels))
    with serving(look=look) as (address, _):
        client(f"{address}/look")([image], ["a"])
    assert seen[0].mode == mode and seen[0].tobytes() == image.tobytes()


# --------------------------------------------------------------------------------------- masked, not lost and not 0


def test_what_cannot_be_scored_is_none(caplog):
    def partly(images, prompts):
        return [None, math_nan, 1.5, float("inf")]

    math_nan = float("nan")
    with serving(partly=partly) as (address, _):
        assert client(f"{address}/partly")(pictures(4), ["a"] * 4) == [None, None, 1.5, None]
        status, answer = post(f"{address}/partly", message(4))
    assert status == 200 and [r["status"] for r in answer["results"]] == ["no_score", "no_score", "ok", "no_score"]
    assert caplog.text.count("3 of 4 pictures have no score: no_score") == 1


def test_a_reward_that_raises_masks_its_pictures_and_tells_the_client_nothing(caplog):
    def broken(images, prompts):
        raise RuntimeError("secret path")

    with serving(broken=broken) as (address, _):
        status, answer = post(f"{address}/broken", message(2))
    assert status == 200 and answer["results"] == [{"status": "no_score", "score": None}] * 2
    assert "secret" not in json.dumps(answer) and "secret path" in caplog.text  # the server's own log has it


def test_damaged_pictures_mask_themselves_only():
    whole, other = (encode_png(Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))) for _ in range(2))
    files = [other, whole[: len(whole) // 2], b"GIF89a" + whole, b"", other]
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    files.append(jpeg.getvalue())
    items = [{"image": base64.b64encode(data).decode(), "prompt": "a"} for data in files]
    with serving(one=lambda images, prompts: [1.0] * len(images)) as (address, _):
        status, answer = post(f"{address}/one", message(items=items))
    assert status == 200
    assert [r["status"] for r in answer["results"]] == ["ok", "bad_picture", "bad_picture", "bad_picture", "ok", "bad_picture"]


# ------------------------------------------------------------------------------------------- what the server refuses


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height, *more):
    """A small PNG file that claims to be large, or becomes so by ``more`` chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_texts_in_a_picture_are_not_unpacked_without_end():
    packed = zlib.compress(bytes(2**20 - 10))
    compressed = [chunk(b"zTXt", b"k%d\0\0" % i + packed) for i in range(8)]
    international = [chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + packed) for i in range(8)]
    files = [bomb(8, 8), bomb(8, 8, *compressed), bomb(8, 8, *international), bomb(8, 8, chunk(b"tEXt", b"k\0some text"))]
    items = [{"image": base64.b64encode(data).decode(), "prompt": "a"} for data in files]
    with serving(one=lambda images, prompts: [1.0] * len(images)) as (address, _):
        status, answer = post(f"{address}/one", message(items=items))
    assert status == 200 and [r["status"] for r in answer["results"]] == ["ok", "bad_picture", "bad_picture", "ok"]


SMALL = Limits(body_bytes=4000, items=2, picture_pixels=100, total_pixels=150)

REFUSALS = {
    "malformed JSON": (b'{"version": 1', 422, "JSON"),
    "no JSON": (b"\xff\xfe", 422, "JSON"),
    "deep JSON": (b'{"items":' + b"[" * 1000, 422, "recursion"),
    "an unknown field": (message(extra=1), 422, "extra"),
    "another version": (message(version=2), 422, "version"),
    "a version of another kind": (message(version="1"), 422, "version"),
    "no items": (message(items=[]), 422, "items"),
    "a wrong id": (message(request_id="../../x"), 422, "request_id"),
    "NaN metadata": (
        json.dumps(message(items=[{**message()["items"][0], "metadata": {"a": float("nan")}}])).encode(), 422, "metadata"
    ),
    "no base64": (message(items=[{"image": "!!", "prompt": "a"}]), 422, "base64"),
    "a path for a picture": (message(items=[{"image": {"path": "/etc/passwd"}, "prompt": "a"}]), 422, "image"),
    "a long name": (message(**{"\x1b[31m\n" + "x" * 900: 1}), 422, "\\x1b[31m\\n" + "x" * 70 + "..."),
    "too many items": (message(3), 413, "3 pictures, at most 2"),
    "too many bytes": (message() | {"request_id": "a" * 5000}, 413, "at most 4000"),
    "too large a picture": (with_picture(bomb(11, 10)), 413, "11 x 10"),
    "a decompression bomb": (with_picture(bomb(60000, 60000)), 413, "pixels"),
    "a smaller bomb": (with_picture(bomb(12000, 12000)), 413, "pixels"),
    "too many pixels together": (
        message(items=[{"image": base64.b64encode(bomb(9, 9)).decode(), "prompt": "a"}] * 2), 413, "162 pixels"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_server():
    called = []

    def count(images, prompts, **metadata):
        called.append(len(images))
        return [1.0] * len(images)

    with serving(count=count, limits=SMALL, token=TOKEN) as (address, _):
        yield f"{address}/count", called


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused(small_server, kind):
    address, called = small_server
    body, expected, reason = REFUSALS[kind]
    before = len(called)
    status, answer = post(address, body, Authorization=f"Bearer {TOKEN}")
    assert (status, list(answer)) == (expected, ["error"]) and reason in answer["error"]
    assert "Traceback" not in answer["error"] and "passwd" not in answer["error"]
    assert len(called) == before
    with httpx2.Client(trust_env=False) as http:
        assert http.get(address.replace("/count", "/health")).json() == {"status": "ok"}


@pytest.mark.parametrize("header", [None, "Bearer wrong-token-of-some-length", TOKEN, f"Basic {TOKEN}", "Bearer", "Bearer é"])
def test_unauthorised_before_anything_else(small_server, header):
    address, called = small_server
    headers = {} if header is None else {"Authorization": header.encode()}
    for body in (message(), b"\xff" * 10):
        status, answer = post(address, body, **headers)
        assert (status, answer) == (401, {"error": "a valid bearer token is needed"})
    assert not called


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/x-pickle", "text/plain", "", "application/json"])
def test_a_pickle_is_never_parsed(small_server, tmp_path, kind):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    address, _ = small_server
    body = pickle.dumps({"images": [], "trap": Trap()})
    status, _ = post(address, body, Authorization=f"Bearer {TOKEN}", **{"Content-Type": kind})
    assert status == (422 if kind == "application/json" else 415)
    assert not (tmp_path / "sprung").exists()


def raw(address, text, then=b"", patience=2.0):
    """What the server answers to bytes on a socket."""
    host, port = address.removeprefix("http://").partition("/")[0].split(":")
    with socket.create_connection((host, int(port)), timeout=patience) as sock:
        sock.sendall(text.encode() + then)
        answer = b""
        while b"\r\n\r\n" not in answer and (piece := sock.recv(4096)):
            answer += piece
    return answer.decode().partition("\r\n")[0]


HEAD = f"POST /count HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"


def test_length_is_needed_and_checked_before_the_body_is_sent(small_server):
    address, _ = small_server
    assert "413" in raw(address, HEAD + "Content-Length: 99999999999\r\n\r\n")  # without waiting for a single byte
    assert "411" in raw(address, HEAD + "Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n")
    assert "400" in raw(address, HEAD + "Content-Length: -5\r\n\r\n")


def test_a_client_that_sends_far_too_much_hears_why(small_server):
    address, _ = small_server
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    with httpx2.Client(trust_env=False) as http, pytest.raises(CRDError, match=r"HTTP 413.*at most 4000"):
        attempts.post(http, address, bytes(20_000_000), headers, 5, time.monotonic() + 5)  # more than the sockets buffer


def test_a_body_that_does_not_come_is_given_up(caplog):
    limits = Limits(body_seconds=0.2, requests=1)
    with serving(count=first_byte, token=TOKEN, limits=limits) as (address, service):
        assert "408" in raw(address, HEAD + "Content-Length: 100\r\n\r\n", b"{")
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as sock:  # gone in the middle
            sock.sendall((HEAD + "Content-Length: 100\r\n\r\n{").encode())
        assert post(f"{address}/count", message(), Authorization=f"Bearer {TOKEN}")[0] in (200, 429)
        wait_for(lambda: service.active == 0)
    assert "Traceback" not in caplog.text


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_it_takes_more_than_it_can_gets_429_and_the_client_waits_for_its_turn():
    release, running = threading.Event(), threading.Event()

    def slow(images, prompts):
        running.set()
        release.wait(5)
        return first_byte(images, prompts)

    with serving(slow=slow, limits=Limits(requests=1)) as (address, _):
        scores = []
        first = threading.Thread(target=lambda: scores.append(client(f"{address}/slow")(pictures(3), ["a"] * 3)))
        first.start()
        assert running.wait(5)
        status, answer = post(f"{address}/slow", message())
        assert status == 429 and "1 requests" in answer["error"]
        threading.Timer(0.3, release.set).start()
        assert client(f"{address}/slow")(pictures(2), ["a"] * 2) == [0, 1]
        first.join()
    assert scores == [[0, 1, 2]]


def test_a_request_that_was_given_up_and_sent_again_takes_one_place():
    release, calls, answers = threading.Event(), [], []

    def slow(images, prompts):
        calls.append(len(images))
        release.wait(5)
        return first_byte(images, prompts)

    with serving(slow=slow, limits=Limits(requests=3)) as (server, service):
        address, same = f"{server}/slow", json.dumps(message()).encode()
        for _ in range(3):
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(address, content=same, headers={"Content-Type": "application/json"}, timeout=0.5, trust_env=False)
        wait_for(lambda: service.active == 1)
        other = threading.Thread(target=lambda: answers.append(post(address, message(2))[0]))
        other.start()
        wait_for(lambda: service.active == 2)
        release.set()
        other.join()
        assert answers == [200] and post(address, same)[0] == 200 and calls == [1, 2]


def test_a_server_out_of_memory_says_so_and_is_not_asked_again(caplog):
    asked = []

    def hungry(images, prompts):
        asked.append(len(images))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with serving(hungry=hungry) as (address, _), pytest.raises(CRDError, match=r"HTTP 413.*out of memory; send fewer pictures"):
        client(f"{address}/hungry")(pictures(3), ["a"] * 3)
    assert asked == [3] and "reward hungry ran out of memory with 3 pictures" in caplog.text


def test_all_errors_are_one_line_of_json(caplog):
    with serving(one=first_byte) as (address, service), httpx2.Client(trust_env=False) as http:
        wrong = [http.get(f"{address}/one"), http.post(f"{address}/a/b", json={}), http.get(address)]
        service.rewards["one"] = Reward(RewardSet([NamedReward("another", first_byte)]), "a mistake of ours")
        wrong.append(http.post(f"{address}/one", json=message()))
    assert [answer.status_code for answer in wrong] == [405, 404, 404, 500]
    assert all(list(answer.json()) == ["error"] for answer in wrong) and wrong[0].headers["allow"] == "POST"
    assert "KeyError" in caplog.text and "KeyError" not in wrong[3].text


def test_ready_is_not_health():
    with serving(one=first_byte, loaded=False) as (address, service), httpx2.Client(trust_env=False) as http:
        assert http.get(f"{address}/health").status_code == 200
        assert http.get(f"{address}/ready").status_code == 503
        assert post(f"{address}/one", message())[0] == 503
        service.rewards["one"] = Reward(RewardSet([NamedReward("one", first_byte)]), "h")
        assert http.get(f"{address}/ready").status_code == 200
        assert post(f"{address}/other", message())[0] == 404
        assert http.get(f"{address}/docs").status_code == http.get(f"{address}/openapi.json").status_code == 405


def test_a_request_that_is_sent_again_is_answered_and_not_scored_again():
    calls, begun = [], threading.Event()

    def counting(images, prompts):
        calls.append(len(images))
        begun.set()
        time.sleep(0.2)
        return [float(len(calls))] * len(images)

    limits = Limits(remembered=2)
    with serving(counting=counting, limits=limits) as (server, _):
        address = f"{server}/counting"
        request, answers = message(), []
        first = threading.Thread(target=lambda: answers.append(post(address, request)))
        first.start()
        assert begun.wait(5)
        answers.append(post(address, request))  # while it is being scored
        first.join()
        answers.append(post(address, request))  # and after
        assert answers[0] == answers[1] == answers[2] and calls == [1]
        status, answer = post(address, message(2, request_id=request["request_id"]))
        assert status == 409 and "another request" in answer["error"]
        for _ in range(2):
            post(address, message())
        post(address, request)  # by now forgotten
        assert calls == [1] * 4


# ------------------------------------------------------------------------------------------- what the client endures


@contextmanager
def liar(*answers):
    """A server that answers the n-th connection with the n-th of these (then the last): bytes, or bytes from the request."""
    seen, stop = [], threading.Event()

    def handle(connection, answer):
        with connection:
            data, length = b"", -1
            while length < 0 or len(data.partition(b"\r\n\r\n")[2]) < length:
                if not (piece := connection.recv(65536)):  # the client has hung up
                    return
                data += piece
                if b"\r\n\r\n" in data:
                    length = int(data.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            head, _, body = data.partition(b"\r\n\r\n")
            seen.append(head.decode())
            try:
                for piece in answer(json.loads(body)):
                    if isinstance(piece, float):
                        stop.wait(piece)
                    else:
                        connection.sendall(piece)
            except OSError:  # the client has hung up
                pass

    def accept():
        for index in range(1000):
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            workers.append(threading.Thread(target=handle, args=(connection, answers[min(index, len(answers) - 1)])))
            workers[-1].start()

    workers = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        listener = threading.Thread(target=accept)
        listener.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}/lie", seen
        finally:
            stop.set()
            sock.shutdown(socket.SHUT_RDWR)
            for thread in [listener, *workers]:
                thread.join()


def http(content, status="200 OK", extra=""):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n{extra}\r\n".encode() + content


def honest(request, **changes):
    results = [{"status": "ok", "score": 0.5} for _ in request["items"]]
    answer = {"version": 1, "request_id": request["request_id"], "model": "lie", "config_hash": "h", "results": results}
    return [http(json.dumps({**answer, **changes}).encode())]


def content_of(answer):
    return answer[0].partition(b"\r\n\r\n")[2]


OK = {"status": "ok", "score": 0.5}

LIES = {
    "too short": (lambda r: honest(r, results=[OK]), "1 results for 2"),
    "too long": (lambda r: honest(r, results=[OK] * 3), "3 results for 2"),
    "null for an ok item": (lambda r: honest(r, results=[OK, {"status": "ok", "score": None}]), "does not go with"),
    "a score for a failed item": (lambda r: honest(r, results=[OK, {"status": "no_score", "score": 0.0}]), "does not go with"),
    "NaN": (lambda r: honest(r, results=[OK, {"status": "ok", "score": float("nan")}]), "finite"),
    "too large a number": (lambda r: [http(content_of(honest(r)).replace(b"0.5", b"1e999"))], "finite"),
    "a number as text": (lambda r: honest(r, results=[OK, {"status": "ok", "score": "1"}]), "number"),
    "an unknown status": (lambda r: honest(r, results=[OK, {"status": "fine", "score": 1.0}]), "status"),
    "a wrong id": (lambda r: honest(r, request_id="0" * 32), "answer is to request"),
    "a wrong version": (lambda r: honest(r, version=2), "version"),
    "an unknown field": (lambda r: honest(r, surprise=1), "surprise"),
    "no JSON": (lambda r: [http(b"<html>")], "JSON"),
    "a pickle": (lambda r: [http(pickle.dumps({"scores": [1, 2]}))], "JSON"),
    "too many bytes": (lambda r: [http(b" " * (2**20 + 1))], "longer than"),
    "endless": (lambda r: [b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * 65536] * 32], "longer than"),
    "packed": (lambda r: [http(zlib.compress(content_of(honest(r))), extra="Content-Encoding: deflate\r\n")], "JSON"),
    "elsewhere": (lambda r: [http(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/x\r\n")], "redirects are not"),
    "400": (lambda r: [http(b"no", "400 Bad Request")], "HTTP 400: no"),
    "400 at length": (lambda r: [http(b"\x1b[2J\n" * 900, "400 Bad Request")], r"HTTP 400: (\\x1b\[2J\\n){55}\\x1b\[\.\.\.$"),
    "401": (lambda r: [http(b"no", "401 Unauthorized")], "HTTP 401"),
    "413": (lambda r: [http(b"no", "413 Too Large")], "HTTP 413"),
}


@pytest.mark.parametrize("kind", LIES)
def test_wrong_answers_and_refusals_end_the_call_at_once(kind):
    answer, reason = LIES[kind]
    with liar(answer) as (address, seen), pytest.raises(CRDError, match=reason) as raised:
        client(address)(pictures(2), ["a"] * 2)
    assert len(seen) == 1 and address in str(raised.value) and len(str(raised.value)) < 600


PASSING = {
    "500": lambda r: [http(b"", "500 Internal Server Error")],
    "503": lambda r: [http(b"", "503 Service Unavailable", "Retry-After: 0\r\n")],
    "429": lambda r: [http(b"", "429 Too Many Requests")],
    "dies before its answer": lambda r: [],
    "dies in the middle of the head": lambda r: [b"HTTP/1.1 200"],
    "dies in the middle of the body": lambda r: [honest(r)[0][:-20]],
    "says nothing": lambda r: [30.0],
    "stops in the middle": lambda r: [honest(r)[0][:-20], 30.0],
    "is no HTTP": lambda r: [b"SSH-2.0-OpenSSH\r\n\r\n"],
}


@pytest.mark.parametrize("kind", PASSING)
def test_what_may_pass_is_asked_again_with_the_same_id(kind):
    ids = []

    def right(request):
        ids.append(request["request_id"])
        return honest(request)

    def wrong(request):
        ids.append(request["request_id"])
        return PASSING[kind](request)

    with liar(wrong, right) as (address, seen):
        assert client(address, timeout=0.2)(pictures(2), ["a"] * 2) == [0.5, 0.5]
    assert len(seen) == 2 and len(set(ids)) == 1


def test_the_server_says_how_long_to_wait(monkeypatch):
    monkeypatch.setattr(attempts, "LONGEST_WAIT", 0.3)  # of our own choice, and no limit to theirs
    with liar(lambda r: [http(b"", "503 Service Unavailable", "Retry-After: 1\r\n")], honest) as (address, _):
        began = time.monotonic()
        assert client(address)(pictures(1), ["a"]) == [0.5]
        assert 1 <= time.monotonic() - began < 4
    late = liar(lambda r: [http(b"", "503 Service Unavailable", "Retry-After: 90\r\n")])
    with late as (address, _), pytest.raises(CRDError, match=r"1 attempts; .*\(to be asked again after 90 s\)"):
        client(address)(pictures(1), ["a"])


@pytest.mark.parametrize("kind", ["500", "says nothing", "drips", "nobody"])
def test_patience_ends_at_the_deadline(kind, caplog):
    drips = [b"HTTP/1.1 200 OK\r\n\r\n", *[b" ", 0.05] * 200]
    with liar(lambda r: drips if kind == "drips" else PASSING["500" if kind == "nobody" else kind](r)) as (lying, _):
        address = "http://127.0.0.1:1/nobody" if kind == "nobody" else lying
        began = time.monotonic()
        with pytest.raises(CRDError, match=r"no answer in 0\.8 s and [1-4] attempts"):
            client(address, timeout=0.3, deadline=0.8)(pictures(1), ["a"])
        assert time.monotonic() - began < 5
    assert caplog.text.count("It is asked again for up to 0.8 s") <= 1  # once per outage


def test_one_failure_ends_the_whole_call_without_waiting_for_the_others(caplog):
    def first_hangs(request):
        return [30.0] if request["items"][0]["prompt"] == "first" else [http(b"", "400 Bad Request")]

    with liar(first_hangs) as (address, seen):
        began = time.monotonic()
        with pytest.raises(CRDError, match="HTTP 400"):
            client(address, chunk=1, in_flight=2, timeout=20, deadline=20)(pictures(30), ["first", *["a"] * 29])
        assert time.monotonic() - began < 5 and len(seen) < 10
        assert "asked again" not in caplog.text  # which is what a cut connection would mean
        # to the run it is a batch without rewards, counted and never 0
        scores = RewardSet([NamedReward("r", client(address))]).score(pictures(2), ["a"] * 2, [{}] * 2)
        assert np.isnan(scores.total).all() and scores.failures == {"r": 2}


def test_another_reward_behind_the_same_address_is_noticed():
    with liar(honest, lambda r: honest(r, config_hash="other")) as (address, _):
        reward = client(address)
        assert reward(pictures(1), ["a"]) == [0.5]
        with pytest.raises(CRDError, match="config_hash is other, expected h"):
            reward(pictures(1), ["a"])
    with liar(honest) as (address, _), pytest.raises(CRDError, match="config_hash is h, expected pinned"):
        client(address, config_hash="pinned")(pictures(1), ["a"])


def test_metadata_that_is_no_json_is_not_sent():
    with liar(honest) as (address, seen), pytest.raises(ValueError, match="metadata"):
        client(address)(pictures(1), ["a"], broken=[{1, 2}])
    assert not seen


# ------------------------------------------------------------------------------------------------- tokens, addresses


def token_file(folder, text=TOKEN, mode=0o600):
    path = folder / "reward.token"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tokens_from_file_and_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    path = token_file(tmp_path, f"{TOKEN}\n")
    with serving(one=first_byte, token=TOKEN) as (address, _):
        for access in ({"token_file": path}, {"token_env": "SOME_TOKEN"}):
            assert client(f"{address}/one", **access)(pictures(2), ["a"] * 2) == [0, 1]
        with pytest.raises(CRDError, match="HTTP 401"):
            client(f"{address}/one")(pictures(2), ["a"] * 2)


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("", 0o600, "at least 16"),
        ("short", 0o600, "at least 16"),
        ("two words and some more", 0o600, "without spaces"),
        ("line one of it\nline two of it", 0o600, "without spaces"),
        ("ü" * 20, 0o600, "ASCII"),
        (TOKEN, 0o640, "chmod 600"),
        (TOKEN, 0o604, "chmod 600"),
        (TOKEN, 0o622, "chmod 600"),
    ],
)
def test_bad_token_files(tmp_path, text, mode, reason, crd):
    path = token_file(tmp_path, text, mode)
    with pytest.raises(CRDError, match=reason) as raised:
        client("http://127.0.0.1:1/x", token_file=path)
    assert TOKEN not in str(raised.value)
    code, printed = crd("serve-reward", "blue", "--port", 0, "--token-file", path)
    assert code == 2 and reason in printed


@pytest.mark.parametrize(
    ("address", "options", "reason"),
    [
        ("http://127.0.0.1:1/x", {"token_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE of the token is not set"),
        ("http://127.0.0.1:1/x", {"token_file": "nowhere"}, "no token file nowhere"),
        ("http://127.0.0.1:1/x", {"token_file": "a", "token_env": "B"}, "not both"),
        ("http://127.0.0.1:1/x", {"token": TOKEN}, r"token: Extra inputs.*There are: chunk"),
        ("http://127.0.0.1:1/x", {"chunk": 0}, "chunk"),
        ("http://user:password@127.0.0.1:1/x", {}, "without password"),
        ("http://127.0.0.1:1/x?token=1", {}, "without password and query"),
        ("http://127.0.0.1:8400", {}, "must look like"),
        ("http://127.0.0.1:port/x", {}, "no address"),
        ("http://192.0.2.1/x", {"token_env": "SOME_TOKEN"}, "would send the token unencrypted"),
        ("http://rewards.example/x", {"token_env": "SOME_TOKEN"}, "would send the token unencrypted"),
        ("http://127.0.0.1.example/x", {"token_env": "SOME_TOKEN"}, "would send the token unencrypted"),
    ],
)
def test_wrong_entries_of_a_recipe(address, options, reason, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    with pytest.raises(CRDError, match=reason):
        resolve_reward(address, options)


@pytest.mark.parametrize(
    ("address", "more"),
    [
        ("https://rewards.example/x", {}),
        ("http://rewards.example/x", {"allow_plain_http": True}),
        ("http://localhost:1/x", {}),
        ("http://[::1]:1/x", {}),
    ],
)
def test_addresses_that_may_get_the_token(address, more, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    assert resolve_reward(address, {"token_env": "SOME_TOKEN", **more}).address == address


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "localhost.example", "127.0.0.1.example", ""]))


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with serving(one=first_byte) as (address, _):
        assert client(f"{address}/one")(pictures(1), ["a"]) == [0]


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nope"], "'nope' is not known"),
        (["blue", "blue"], "names repeat: blue, blue"),
        (["http://127.0.0.1:1/x"], "cannot be served"),
        (["blue", "--options", "{"], "is not JSON"),
        (["blue", "--options", '{"ocr": {}}'], "ocr is not served"),
        (["blue", "--options", '{"blue": 1}'], "object of objects"),
        (["blue", "--options", '{"blue": {"x": 1}}'], "do not fit 'blue'"),
        (["blue", "--host", "0.0.0.0"], "add --expose and a token"),
        (["blue", "--host", "0.0.0.0", "--expose"], "--token-file or --token-env"),
        (["blue", "--host", "192.0.2.1", "--expose", "--token-env", "SOME_TOKEN"], "cannot listen on 192.0.2.1"),
    ],
)
def test_wrong_commands(words, reason, crd, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", TOKEN)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the command lowers it for its process
    code, printed = crd("serve-reward", *words, "--port", 0)
    assert code == 2 and reason in printed.replace("\n", " ")


def test_a_port_in_use(crd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, printed = crd("serve-reward", "blue", "--port", taken.getsockname()[1])
    assert code == 2 and "cannot listen on 127.0.0.1 port" in printed


def test_without_the_extra_the_command_names_it(crd, monkeypatch):
    monkeypatch.delitem(sys.modules, "crd.rewards.remote.server")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    code, printed = crd("serve-reward", "blue")
    assert code == 2 and "pip install 'crd-diffusion[serve]'" in printed


def test_the_hash_tells_configurations_apart(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(): ...")

    def digest(name, options="{}"):
        return make_offers([name], options)[0].config_hash

    first = digest(f"{file}:reward")
    assert first == digest(f"{file}:reward") and make_offers([f"{file}:reward"], "{}")[0].path == "reward"
    file.write_text("def reward(): return")
    assert first != digest(f"{file}:reward")
    assert len({digest("ocr"), digest("blue"), digest("ocr", '{"ocr": {"detect": true}}')}) == 3


SLOW_AT_FIRST = """
import pathlib, time

def slow(images, prompts, **metadata):
    began = pathlib.Path(__file__).with_name("began")
    if not began.exists():
        began.touch()
        time.sleep(60)
    return [float(image.getpixel((0, 0))[0]) for image in images]
"""


@contextmanager
def command(*words):
    """``crd serve-reward`` in a process of its own, after it has said where it listens."""
    program = [sys.executable, "-m", "crd", "serve-reward", *map(str, words)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "config_hash may be" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        yield process, said
    finally:
        process.kill()
        process.communicate()


def test_a_server_killed_in_the_middle_and_started_again_and_stopped_by_ctrl_c(tmp_path, caplog):
    file = tmp_path / "slow.py"
    file.write_text(SLOW_AT_FIRST)
    caplog.set_level(logging.WARNING)
    with command("blue", f"{file}:slow", "--port", 0) as (first, said):
        entry = next(line for line in said.splitlines() if line.endswith("}}") and "/slow" in line)
        address = entry.partition('"')[2].partition('"')[0]
        pinned = entry.rpartition(' "')[2].partition('"')[0]
        scores = []
        reward = client(address, chunk=4, deadline=120, config_hash=pinned)
        call = threading.Thread(target=lambda: scores.append(reward(pictures(10), ["a"] * 10)))
        call.start()
        wait_for((tmp_path / "began").exists, 60)
        first.kill()
        first.wait()
    with command("blue", f"{file}:slow", "--port", address.rpartition(":")[2].partition("/")[0]) as (second, said):
        assert f'name: "{address}"' in said  # the same address again
        call.join(60)
        assert scores == [[float(i) for i in range(10)]]
        assert caplog.text.count("It is asked again") == 1
        second.send_signal(signal.SIGINT)
        rest, _ = second.communicate(timeout=60)
        assert second.returncode == 0 and rest == "Stopped.\n"


WAITS = """
import pathlib, time

def reward(images, prompts, **metadata):
    pathlib.Path(__file__).with_name("began").touch()
    while not pathlib.Path(__file__).with_name("release").exists():
        time.sleep(0.05)
    return [1.0] * len(images)
"""


def test_a_server_that_is_stopped_answers_what_it_scores_and_refuses_the_rest(tmp_path):
    (tmp_path / "mine.py").write_text(WAITS)
    answers = []
    with command(f"{tmp_path / 'mine.py'}:reward", "--port", 0) as (server, said):
        address = said.partition('name: "')[2].partition('"')[0]
        threads = [threading.Thread(target=lambda: answers.append(post(address, message()))) for _ in range(2)]
        threads[0].start()
        wait_for((tmp_path / "began").exists)
        threads[1].start()
        time.sleep(0.5)  # it waits for its turn
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert not answers and server.poll() is None
        (tmp_path / "release").touch()
        rest, _ = server.communicate(timeout=30)
        for thread in threads:
            thread.join()
    assert server.returncode == 0 and rest == "Stopped.\n"
    assert sorted(status for status, _ in answers) == [200, 503] and (503, {"error": "the server is stopping"}) in answers


def test_a_second_ctrl_c_stops_a_server_at_once(tmp_path):
    (tmp_path / "mine.py").write_text(WAITS)
    with command(f"{tmp_path / 'mine.py'}:reward", "--port", 0) as (server, said):
        address = said.partition('name: "')[2].partition('"')[0]
        with ThreadPoolExecutor() as pool:
            call = pool.submit(post, address, message())
            wait_for((tmp_path / "began").exists)
            server.send_signal(signal.SIGINT)
            time.sleep(0.5)
            server.send_signal(signal.SIGINT)
            rest, _ = server.communicate(timeout=5)
            assert isinstance(call.exception(), httpx2.TransportError)
    assert server.returncode == -signal.SIGINT and not rest
