"""The message for a client: a status and one line. No traceback and no path of this machine leaves it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import ValidationError

from edge_sd.errors import (
    DeviceError,
    EdgeSDError,
    InvalidModel,
    InvalidRequest,
    MissingExtra,
    ModelNotFound,
    NumericalError,
    OutputError,
    VariantNotFound,
)

# An absolute path of POSIX or Windows, of at least two names.
PATHS = re.compile(r"(?<![\w:/.])(?:/[^\s/'\":;,()]+){2,}/?|\b[A-Za-z]:\\[^\s'\":;,()]+")
# The command line's options; the same names are fields of a wish.
OPTIONS = re.compile(r"(?<!\S)--([a-z]+(?:-[a-z]+)*)")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]+")


class QueueFull(EdgeSDError):
    """As many jobs wait as the server takes."""


class Stopping(EdgeSDError):
    """The server is being stopped."""


class JobCancelled(EdgeSDError):
    """The job was cancelled before it was done."""


@dataclass(frozen=True)
class Failure:
    """status   of HTTP
    kind     a word for programs, such as "invalid_request"
    """

    status: int
    kind: str
    message: str


def stopped() -> Stopping:
    """The error of whatever a server that stops does not draw."""
    return Stopping("the server is stopping; try again later")


def public(message: str) -> str:
    """A message in one line, without paths and control characters."""
    return CONTROLS.sub(" ", PATHS.sub("(a path of the server)", message)).strip()[:1000]


def describe(error: BaseException) -> Failure:
    """The message for `error`. A bug's error is reported without its text."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return Failure(400, "invalid_request", public(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
    kinds: list[tuple[type[Exception], int, str]] = [
        (QueueFull, 429, "queue_full"),
        (Stopping, 503, "stopping"),
        (JobCancelled, 409, "cancelled"),
        (InvalidRequest, 400, "invalid_request"),
        (ModelNotFound, 404, "model_not_found"),
        (VariantNotFound, 404, "variant_not_found"),
        (MissingExtra, 501, "not_installed"),
        (NumericalError, 500, "numerical_error"),
        (DeviceError, 500, "device_error"),
        (InvalidModel, 500, "invalid_model"),
        (OutputError, 507, "not_written"),
        (EdgeSDError, 500, "error"),
    ]
    for kind, status, word in kinds:
        if isinstance(error, kind):
            message = str(error)
            if kind is InvalidRequest:
                message = OPTIONS.sub(lambda option: f"the field {option[1].replace('-', '_')}", message)
            return Failure(status, word, public(message))
    return Failure(500, "error", "the server made a mistake; its log says more")
