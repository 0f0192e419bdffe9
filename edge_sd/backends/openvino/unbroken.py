"""Calls that Ctrl-C does not break in two.

Python raises KeyboardInterrupt in the main thread, between any two of its operations: after a request was started and
before it was waited for, say, or while pages are still being given back. The device would go on to read arrays that
are freed. No signal reaches other threads, so what the main thread asks for is done in another one: the interrupt ends
the waiting, and the call is finished before the next one begins or the process ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


def unbroken(method: Method) -> Method:
    """The method, done in `self.thread` where the main thread calls it, in about 30 microseconds more."""

    @wraps(method)
    def done(self: Any, *arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return method(self, *arguments, **named)
        return self.thread.submit(method, self, *arguments, **named).result()

    return cast(Method, done)
