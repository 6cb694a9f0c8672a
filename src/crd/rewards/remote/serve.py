"""``crd serve-reward``: loads rewards, listens, and says how to use them in a recipe."""

import hashlib
import json
import re
import socket
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from PIL import Image

import crd
from crd.errors import CRDError
from crd.rewards.named import resolve_reward
from crd.rewards.protocol import NamedReward, RewardSet
from crd.rewards.remote.access import MAKE_ONE, is_loopback, read_token

if TYPE_CHECKING:
    import uvicorn

    from crd.rewards.remote.server import Service


@dataclass(frozen=True)
class Offer:
    """A reward to serve at ``/path``."""

    path: str
    name: str
    options: dict[str, Any]

    @property
    def config_hash(self) -> str:
        """Changes with whatever could change the scores: name, options, the package's version, the file's content."""
        where, _, function = self.name.rpartition(":")
        code = hashlib.sha256(Path(where).read_bytes()).hexdigest() if where.endswith(".py") else where
        facts = json.dumps([function, code, self.options, crd.__version__], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def make_offers(names: list[str], options: str) -> list[Offer]:
    """From names as in recipes and ``{"name": {options}}`` as JSON; the path is the name, or the function's name."""
    try:
        given = json.loads(options)
    except json.JSONDecodeError as error:
        raise CRDError(
            f'--options: {options!r} is not JSON ({error.msg}); expected e.g. \'{{"ocr": {{"detect": true}}}}\''
        ) from None
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise CRDError(f'--options: expected an object of objects, such as {{"ocr": {{"detect": true}}}}, got {options}')
    if unknown := [name for name in given if name not in names]:
        raise CRDError(f"--options: {', '.join(unknown)} is not served; there are {', '.join(names)}.")
    offers = [Offer(name.rpartition(":")[2], name, given.get(name, {})) for name in names]
    for offer in offers:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", offer.path):
            raise CRDError(
                f"{offer.name!r} cannot be served: name a built-in reward, package.module:function or file.py:function."
            )
    if len({offer.path for offer in offers}) < len(offers):
        raise CRDError(f"rewards are served by name, and names repeat: {', '.join(offer.path for offer in offers)}.")
    return offers


def check_exposure(host: str, expose: bool, token: str | None) -> None:
    """Another address than loopback needs to be meant, and needs a token."""
    if is_loopback(host):
        return
    if not expose:
        raise CRDError(f"--host {host} lets other machines in. If that is meant, add --expose and a token; else use 127.0.0.1.")
    if not token:
        raise CRDError(f"--host {host} --expose needs --token-file or --token-env, since anyone could ask. {MAKE_ONE}")


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise CRDError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --host or --port."
        ) from None


def banner(offers: list[Offer], host: str, port: int, access: dict[str, str]) -> str:
    """Where the server listens and what to write into a recipe."""
    name = f"[{host}]" if ":" in host else host
    known = name if is_loopback(host) else "THIS_MACHINE"
    lines = [f"Serving on http://{name}:{port}; Ctrl-C stops. In a recipe:", "rewards:"]
    for offer in offers:
        options = ", ".join(f"{key}: {value}" for key, value in {**access, "config_hash": f'"{offer.config_hash}"'}.items())
        lines.append(f'  - {{name: "http://{known}:{port}/{offer.path}", options: {{{options}}}}}')
    lines.append("config_hash may be left out; with it a run refuses scores of other settings or versions.")
    if not is_loopback(host):
        lines.append("Put TLS in front and write https; clients refuse to send the token over plain http.")
    return "\n".join(lines)


def load(offers: list[Offer], service: "Service") -> None:
    """Makes the rewards; the service answers for each as soon as it is there."""
    from crd.rewards.remote.server import Reward

    for offer in offers:
        rewards = RewardSet([NamedReward(offer.path, resolve_reward(offer.name, offer.options))])
        service.rewards[offer.path] = Reward(rewards, offer.config_hash)


def run(server: "uvicorn.Server", sock: socket.socket, prepare: Callable[[], None]) -> None:
    """Serves until Ctrl-C or SIGTERM, with ``prepare`` beside it in a thread; what that raises ends the server."""
    failures: list[Exception] = []

    def preparing() -> None:
        try:
            prepare()
        except Exception as error:  # noqa: BLE001  raised again below, in the main thread
            failures.append(error)
            server.should_exit = True

    threading.Thread(target=preparing, daemon=True).start()
    with suppress(KeyboardInterrupt):  # which uvicorn raises again or not, depending on the moment of the signal
        server.run(sockets=[sock])
    if failures:
        raise failures[0]
    typer.echo("Stopped.")


def serve(
    names: list[str],
    options: str = "{}",
    host: str = "127.0.0.1",
    port: int = 8400,
    expose: bool = False,
    token_file: Path | None = None,
    token_env: str | None = None,
    requests: int = 8,
) -> None:
    """Serves until Ctrl-C or SIGTERM; raises CRDError for wrong settings and for rewards that cannot be loaded."""
    try:
        from crd.rewards.remote.server import Limits, Service, make_server
    except ImportError as error:
        raise CRDError(f"crd serve-reward needs FastAPI and uvicorn ({error}): pip install 'crd-diffusion[serve]'") from error
    offers = make_offers(names, options)
    token = read_token(token_file, token_env)
    check_exposure(host, expose, token)
    limits = Limits(requests=requests)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    Image.MAX_IMAGE_PIXELS = limits.picture_pixels
    service = Service([offer.path for offer in offers], token, limits)
    access = {"token_file": str(token_file)} if token_file else {"token_env": token_env} if token_env else {}
    with listen(host, port) as sock:

        def prepare() -> None:  # meanwhile /health answers, and /ready says no
            load(offers, service)
            typer.echo(banner(offers, host, sock.getsockname()[1], access))

        typer.echo(f"Loading {', '.join(offer.name for offer in offers)} ...")
        run(make_server(service), sock, prepare)
