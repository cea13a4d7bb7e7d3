"""The file with the keys under which the machines of a deployment talk."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path

import zmq
from msgspec import Struct

from llm_runtime.runtime.errors import UserError

_HEADER = """\
# Keys under which the machines of a deployment talk to each other, made by `runtime keygen`. Whoever can read this file
# belongs to the deployment: copy it over a safe way, and keep it readable by its owner alone.
"""
_MAX_BYTES = 4096


class Keys(Struct, frozen=True):
    """A CURVE key pair, in Z85."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"


def write_keys(path: Path, replace: bool = False) -> None:
    """Makes a new key pair and writes it to a file that its owner alone can read.

    Args:
        replace: also if there is such a file.

    Raises UserError.
    """
    public, secret = zmq.curve_keypair()
    text = f'{_HEADER}public = "{public.decode()}"\nsecret = "{secret.decode()}"\n'
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        try:
            if replace:
                temporary.replace(path)
            else:
                os.link(temporary, path)  # which refuses to replace a file
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError:
        raise UserError(
            f"there is a file {path} already, and machines that use it would no longer understand this one: "
            "give another name, or --force"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another FILE") from None


def read_keys(path: Path) -> Keys:
    """The keys of a file. Raises UserError with what is wrong with it."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(_MAX_BYTES)
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path}; copy it from the machine where it was made, or make it with "
            f"`runtime keygen {path}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it with `runtime keygen`") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a file; make one with `runtime keygen`")
    if status.st_mode & 0o077:
        raise UserError(
            f"{path} can be read or written by other users (mode {status.st_mode & 0o777:04o}); run "
            f"`chmod 600 {path}`, and make new keys if others may have seen it"
        )
    try:
        data = tomllib.loads(text.decode())
        keys = Keys(str(data["public"]), str(data["secret"]))
        if zmq.curve_public(keys.secret.encode()).decode() == keys.public:
            return keys
    except (ValueError, KeyError, zmq.ZMQError):
        pass
    raise UserError(f"{path} does not hold a key pair; make one with `runtime keygen`")
