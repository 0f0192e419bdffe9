"""No telemetry: openvino and nncf report their use to a host of Google's, where openvino_telemetry is installed.

openvino asks for that package when it is imported, and does without one that can't be imported. This is the one change
of the process's state that the runtime makes: the alternative is to write a client's id into a person's home and to
look up a host each time that a picture is drawn.
"""

from __future__ import annotations

import sys


def refuse_telemetry() -> None:
    """Make openvino_telemetry unavailable in this process; called before openvino or nncf is imported."""
    # None in sys.modules is how Python spells "can't be imported". A host program that uses it already keeps it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
