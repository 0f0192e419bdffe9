"""Fuzz the readers of strangers' bytes with atheris: `python -m tests.faults.fuzz [READER…] --seconds 300`.

Each reader runs in a process of its own. What it finds, an exception that is not typed or an input that takes longer
than its size allows, is a file in tests/data/corpus/READER, which tests/faults/test_readers.py gives to it ever after.
Needs atheris, which has no wheels for Windows and macOS (`pip install atheris`).
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
# Processor seconds for an input, and for each of its megabytes.
SLOW, SLOW_MEGABYTE = 1.0, 2.0


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["edge_sd"]):
        from . import readers

        for seed in readers.seeds(name):
            # Imports what the reader needs, instrumented.
            readers.read(name, seed)

    def once(data: bytes) -> None:
        started = time.process_time()
        try:
            readers.read(name, data)
            if (took := time.process_time() - started) > SLOW + SLOW_MEGABYTE * len(data) / 1e6:
                raise TimeoutError(f"{took:.1f} s for {len(data)} bytes")
        except BaseException:
            CORPUS.joinpath(name).mkdir(parents=True, exist_ok=True)
            (CORPUS / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            raise

    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", "-max_len=65536", "-timeout=20", "-rss_limit_mb=4096",
         "-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={folder}/", str(folder)],
        once,
    )  # fmt: skip
    atheris.Fuzz()


def main() -> None:
    from . import readers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", choices=[[], *readers.READERS], default=[])
    parser.add_argument("--seconds", type=int, default=300, help="for each reader")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            for n, seed in enumerate(readers.seeds(options.one)):
                (Path(folder) / str(n)).write_bytes(seed)
            fuzz(options.one, options.seconds, Path(folder))
        return
    failed = False
    print("| reader | seconds | inputs | found |\n| --- | --- | --- | --- |")
    for name in options.readers or readers.READERS:
        command = [sys.executable, "-m", "tests.faults.fuzz", "--one", name, "--seconds", str(options.seconds)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        lines = (done.stdout + done.stderr).splitlines()
        inputs = next((line.split()[-1] for line in lines if "number_of_executed_units" in line), "?")
        errors = [line.strip() for line in lines if "Exception" in line or "Error" in line or "ERROR" in line]
        found = "nothing" if done.returncode == 0 else (errors[0] if errors else f"exit code {done.returncode}")
        failed |= done.returncode != 0
        print(f"| {name} | {time.monotonic() - started:.0f} | {inputs} | {found[:200]} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
