"""Apple's Core AI runtime as a component calls it: one event loop in a thread, assets, and their functions.

The runtime is asynchronous; the pipeline is not. A `Loop` belongs to a backend and runs coroutines to their end for
whichever thread asks. Off macOS 27 the package's own runtime computes on the CPU.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError, InvalidModel, NumericalError
from ...files import hash_file

T = TypeVar("T")
Arrays = dict[str, NDArray[Any]]
# The program of an asset, and the SHA-256 that its writer put beside it.
PROGRAM, HASH, HASH_BYTES = "main.mlirb", "main.hash", 32


class Loop:
    """An event loop in a thread of its own, started by the first coroutine and ended with this object."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of `coroutine`, which may be waited for in any thread but the loop's own."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="coreai", daemon=True).start()
                weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
            loop = self._loop
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


@dataclass(frozen=True)
class InputPort:
    """An input or output of a function: numpy's name of its type, and its static shape."""

    dtype: str
    shape: tuple[int, ...]


def check_asset(path: Path) -> None:
    """Refuse what is no whole asset: the runtime aborts the process on a program that is cut short.

    Raises InvalidModel.
    """
    program, recorded = path / PROGRAM, path / HASH
    for each in (program, recorded):
        # A pipe would never end.
        if not each.is_file():
            raise InvalidModel(f"{path.name} is no Core AI asset: it has no file {each.name}")
    try:
        with recorded.open("rb") as file:
            expected = file.read(HASH_BYTES + 1)
        found = bytes.fromhex(hash_file(program))
    except OSError as error:
        raise InvalidModel(f"{path.name} is no Core AI asset: {error.filename} cannot be read") from error
    if found != expected:
        raise InvalidModel(f"{path.name} is damaged ({PROGRAM} differs from {HASH}); convert the model again")


class Asset:
    """A loaded `.aimodel`; its functions share their weights. `close` gives them back."""

    def __init__(self, path: Path, loop: Loop, units: str = "") -> None:
        """Load an asset, compiled for a ComputeUnitKind of macOS where `units` names one.

        Raises InvalidModel for a damaged asset, DeviceError for one that the runtime refuses.
        """
        check_asset(path)
        self.name, self._loop, self._stack = path.name, loop, AsyncExitStack()
        try:
            loop.run(self._load(path, units))
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise DeviceError(f"Core AI refused {path.name}: {first_line(error)}") from error

    async def _load(self, path: Path, units: str) -> None:
        from coreai.authoring import AIModelAsset

        asset = AIModelAsset.load(path)
        self._model = await self._stack.enter_async_context(asset.executable(_options(units)))
        self._functions = {name: self._model.load_function(name) for name in self._model.function_names}

    @property
    def functions(self) -> dict[str, dict[str, InputPort]]:
        """The inputs of each function by name."""
        return {name: _ports(each.desc, "input") for name, each in self._functions.items()}

    def outputs(self, function: str) -> dict[str, InputPort]:
        """The outputs of a function by name."""
        return _ports(self._functions[function].desc, "output")

    def call(self, function: str, inputs: dict[str, Any]) -> Arrays:
        """Run a function on arrays of the runtime (`array`); numpy arrays that are the caller's. Raises DeviceError."""
        try:
            return self._loop.run(self._call(function, inputs))
        except (RuntimeError, ValueError, TypeError) as error:
            raise DeviceError(f"{self.name} failed: {first_line(error)}") from error

    async def _call(self, function: str, inputs: dict[str, Any]) -> Arrays:
        found = await self._functions[function](inputs)
        # A view's buffer is the runtime's, which takes it back.
        return {name: np.array(value.numpy()) for name, value in found.items()}

    def close(self) -> None:
        """Give the memory and the scratch files back."""
        self._functions.clear()
        self._model = None
        self._loop.run(self._stack.aclose())


def array(value: NDArray[Any]) -> Any:
    """A numpy array as the runtime takes it."""
    from coreai.runtime import NDArray as RuntimeArray

    return RuntimeArray(value)


def check_finite(name: str, outputs: Arrays) -> None:
    """Raise NumericalError for outputs that are not numbers: float16 did not hold them."""
    for each, value in outputs.items():
        if not np.isfinite(value).all():
            raise NumericalError(f"{name} overflows: {each} is not finite")


def first_line(error: BaseException) -> str:
    """What an error of the runtime says, as one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _ports(desc: Any, side: str) -> dict[str, InputPort]:
    names = getattr(desc, f"{side}_names")
    found = {name: getattr(desc, f"{side}_descriptor")(name) for name in names}
    return {name: InputPort(each.dtype, tuple(int(n) for n in each.shape)) for name, each in found.items()}


def _options(units: str) -> Any:
    """Specialization options for a compute unit of macOS; None elsewhere."""
    if not units:
        return None
    from coreai.runtime import ComputeUnitKind, SpecializationOptions

    if units == "cpu":
        return SpecializationOptions.cpu_only()
    return SpecializationOptions.from_preferred_compute_unit_kind(getattr(ComputeUnitKind, units)())
