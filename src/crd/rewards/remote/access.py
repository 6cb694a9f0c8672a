"""Who may ask: tokens from files or the environment, and which addresses never leave this machine."""

import ipaddress
import os
import stat
from pathlib import Path

from crd.errors import CRDError

MIN_TOKEN = 16  # characters
MAKE_ONE = "Make one: (umask 077; python -c 'import secrets; print(secrets.token_urlsafe(32))' > reward.token)"


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None, variable: str | None, minimum: int = MIN_TOKEN) -> str | None:
    """The bearer token of a file that only its owner may read, or of an environment variable; None if neither is named.

    ``minimum``: of characters, less for tokens that others give out.
    """
    advice = f" {MAKE_ONE}" if minimum >= MIN_TOKEN else ""
    if file and variable:
        raise CRDError(f"a token comes from a file or from the environment, not both: got {file} and {variable}.")
    if file:
        return _checked(_private_text(file, advice), f"the token file {file}", minimum, advice)
    if variable:
        if variable not in os.environ:
            raise CRDError(f"the environment variable {variable} of the token is not set.{advice}")
        return _checked(os.environ[variable], f"the token in {variable}", minimum, advice)
    return None


def _private_text(file: Path, advice: str) -> str:
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        text = file.read_text("ascii")
    except FileNotFoundError:
        raise CRDError(f"there is no token file {file}.{advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CRDError(f"the token file {file} cannot be read as ASCII text: {error}") from None
    if os.name == "posix" and mode & 0o077:
        raise CRDError(f"the token file {file} has mode {mode:o}, so others can read or change it. Run: chmod 600 {file}")
    return text


def _checked(text: str, source: str, minimum: int, advice: str) -> str:
    token = text.strip()
    if len(token) < minimum or not (token.isascii() and token.isprintable()) or " " in token:
        raise CRDError(
            f"{source} must hold ASCII characters without spaces, at least {minimum}; it has {len(token)} characters.{advice}"
        )
    return token
