"""One artist in a process of its own: `python -m edge_sd.apps.compare.worker` with a job, as JSON, on stdin.

To draw is to write STEM.npy (latents of every step) and then STEM.png of each shot into the job's folder. To be timed
is to draw the first shot once, as a fresh process, and to write one JSON file. What it says on stdout is one JSON
object a line; what libraries print there goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

from edge_sd.errors import EdgeSDError, OutputError


class Unwritable(OutputError):
    """The folder of the comparison can't be written to: no variant's failure, but the end of all of them."""


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin)

    def say(**what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        if job["timed"]:
            _time(job)
        else:
            _draw(job, say)
    except EdgeSDError as error:
        say(error=" ".join(str(error).split()), unwritable=isinstance(error, Unwritable))
        return 1
    except Exception as error:
        # A library's own error: the row says it, and the traceback goes where the parent may look.
        import traceback

        traceback.print_exc()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        say(error=f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300])
        return 1
    return 0


def _open(job: dict[str, Any]) -> Any:
    from .artists import open_artist
    from .plan import Artist

    weights = Path(job["weights"]) if job["weights"] else None
    return open_artist(Artist(**job["artist"]), Path(job["model"]), weights)


def _request(job: dict[str, Any], shot: dict[str, Any]) -> Any:
    from .plan import Shot, Wishes

    return Wishes(**job["wishes"]).request(Shot(**shot))


def _draw(job: dict[str, Any], say: Any) -> None:
    import numpy as np
    from PIL import Image

    from .plan import Shot

    folder, artist = Path(job["folder"]), _open(job)
    about = artist.about(_request(job, job["shots"][0]))
    _keep(folder / "artist.json", json.dumps(about, indent=1).encode())
    for shot in job["shots"]:
        drawing = artist.draw(_request(job, shot))
        latents, picture = BytesIO(), BytesIO()
        np.save(latents, drawing.latents.astype(np.float32))
        Image.fromarray(drawing.pixels).save(picture, "PNG")
        stem = Shot(**shot).stem
        _keep(folder / f"{stem}.npy", latents.getvalue())
        # The picture comes last: a shot that has one is whole.
        _keep(folder / f"{stem}.png", picture.getvalue())
        say(done=stem)


def _time(job: dict[str, Any]) -> None:
    import numpy as np
    from PIL import Image

    from .energy import consumed, joules
    from .plan import Shot

    (shot,) = job["shots"]
    request = _request(job, shot)
    started = time.perf_counter()
    artist = _open(job)
    artist.prepare(request)
    load = time.perf_counter() - started
    drawing = artist.draw(request)
    first = time.time() - job["started"]
    memory = peak_memory()
    before = consumed()
    again = artist.draw(request)
    energy = joules(before, consumed())
    drawn = Path(job["folder"]) / f"{Shot(**shot).stem}.png"
    with Image.open(drawn) as image:
        same = np.array_equal(np.asarray(image), drawing.pixels)
    steps = again.steps[1:] or again.steps
    times = {"load": load, "first": first, "step": statistics.median(steps), "decode": again.decode,
             "picture": sum(again.steps) + again.decode, "memory": memory, "energy": energy, "same": same}  # fmt: skip
    _keep(Path(job["output"]), json.dumps(times).encode())


def _keep(path: Path, data: bytes) -> None:
    """Write a result whole. Raises Unwritable."""
    from edge_sd.files import write_atomically

    try:
        write_atomically(path, data)
    except OSError as error:
        why = error.strerror or error
        raise Unwritable(f"{path} cannot be written: {why}; what was drawn is kept, compare again") from error


def peak_memory() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system does not tell."""
    # Linux's ru_maxrss starts at what the parent process had; VmHWM does not.
    status = Path("/proc/self/status")
    if status.is_file():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(match[1]) * 1024 if match else None
    if sys.platform == "win32":
        return None
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


if __name__ == "__main__":
    sys.exit(main())
