"""The executor: computes a `.mlpackage` with torch on any machine, where there is no Core ML.

Two modes. "exact" computes in float32 whatever the program says: what the conversion itself lost. "fp16" rounds the
result of every operation to its declared type, so that what overflows on a device overflows here; the first operation
that did is kept in `overflow`. Sums inside an operation are float32 in both, as on Apple's engines. It says nothing
about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_sd.bundle.mlpackage.constexpr import CONSTEXPR
from edge_sd.bundle.mlpackage.package import Lazy, Operation, Package, TensorType
from edge_sd.errors import DeviceError

from .ops import OPS

Mode = Literal["exact", "fp16"]
LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Overflow:
    """An operation whose finite inputs made a value that float16 does not have."""

    operation: str
    kind: str
    largest: float

    def __str__(self) -> str:
        return f"{self.kind} {self.operation} reaches {self.largest:g}, float16 ends at {LARGEST_FLOAT16:g}"


class Program:
    """One function of a package, ready to run; `inputs` and `outputs` are its names with their types."""

    def __init__(self, package: Package, mode: Mode = "fp16", function: str | None = None) -> None:
        self.path, self.mode = package.path, mode
        name = function or package.default
        if name not in package.functions:
            raise DeviceError(f"{package.path.name} has no function {name!r}; it has: {', '.join(package.functions)}")
        body = package.functions[name]
        self.inputs = body.inputs
        self.overflow: Overflow | None = None
        # Called with the name and the value of each result.
        self.watch: Callable[[str, Tensor], None] | None = None
        self._constants: dict[str, Any] = {}
        self._operations = [each for each in body.operations if not self._take_constant(each)]
        types = {output: kind for each in body.operations for output, kind in each.outputs} | body.inputs
        self.outputs = {output: types[output] for output in body.outputs}
        self._dead = self._last_uses()
        for each in self._operations:
            if each.kind not in OPS:
                raise DeviceError(
                    f"{package.path.name}: the executor does not know the operation {each.kind!r} ({each.name})"
                )

    @classmethod
    def open(cls, path: Path, mode: Mode = "fp16", function: str | None = None) -> Program:
        """Read a package. Raises InvalidModel (damaged), DeviceError (an operation that is not known)."""
        return cls(Package.open(path), mode, function)

    @classmethod
    def functions(cls, path: Path) -> dict[str, dict[str, TensorType]]:
        """The functions of a package and the inputs of each, the default one first. Raises InvalidModel."""
        package = Package.open(path)
        names = sorted(package.functions, key=lambda name: name != package.default)
        return {name: package.functions[name].inputs for name in names}

    def predict(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once: arrays by name in, arrays by name out, of the declared types. Raises DeviceError."""
        values: dict[str, Any] = {}
        for name, kind in self.inputs.items():
            if name not in inputs:
                raise DeviceError(f"{self.path.name} needs the input {name!r}")
            if inputs[name].shape != kind.shape:
                found = inputs[name].shape
                raise DeviceError(
                    f"{self.path.name} takes {name} of shape {kind.shape}, fixed at conversion; got {found}"
                )
            values[name] = self._rounded(torch.from_numpy(np.array(inputs[name])), kind)
            if self.watch is not None:
                self.watch(name, values[name])
        with torch.no_grad():
            for operation, dead in zip(self._operations, self._dead, strict=True):
                self._run(operation, values)
                for name in dead:
                    del values[name]
        return {
            name: self._value(name, values).numpy().astype(kind.dtype if self.mode == "fp16" else np.float32)
            for name, kind in self.outputs.items()
        }

    def constant(self, name: str) -> NDArray[Any]:
        """A constant's array by its name in the program, decompressed where it is compressed."""
        return np.asarray(self._array(name))

    def substitute(self, name: str, value: NDArray[Any]) -> None:
        """Compute with another value of a constant from now on; the package stays as it is."""
        self._constants[name] = torch.from_numpy(value)

    def _run(self, operation: Operation, values: dict[str, Any]) -> None:
        arguments: dict[str, Any] = {}
        for name, given in operation.inputs.items():
            each = [self._value(one, values) for one in given]
            arguments[name] = each if name == "values" else each[0]
        try:
            result = OPS[operation.kind](**arguments)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            detail = str(error).strip().splitlines() or [type(error).__name__]
            raise DeviceError(f"{self.path.name}: {operation.kind} {operation.name} failed: {detail[0]}") from error
        results = result if isinstance(result, tuple) else (result,)
        for (name, kind), tensor in zip(operation.outputs, results, strict=True):
            rounded = self._rounded(tensor, kind)
            if self.overflow is None and kind.dtype == "float16" and self.mode == "fp16":
                self._look_for_overflow(operation, arguments, tensor, rounded)
            values[name] = rounded
            if self.watch is not None:
                self.watch(name, rounded)

    def _look_for_overflow(
        self, operation: Operation, arguments: dict[str, Any], before: Tensor, after: Tensor
    ) -> None:
        if bool(torch.isfinite(after).all()):
            return
        flat = [x for each in arguments.values() for x in (each if isinstance(each, list) else [each])]
        if all(bool(torch.isfinite(x).all()) for x in flat if isinstance(x, Tensor) and x.is_floating_point()):
            self.overflow = Overflow(operation.name, operation.kind, float(before.abs().max()))

    def _rounded(self, x: Tensor, kind: TensorType) -> Tensor:
        if kind.dtype == "float16":
            return x.half().float() if self.mode == "fp16" else x.float()
        if kind.dtype == "float32":
            return x.float()
        if kind.dtype == "bool":
            return x.bool()
        # Every integer that a network computes with fits, and torch has few operations for the others.
        return x.int()

    def _value(self, given: str | Lazy, values: dict[str, Any]) -> Any:
        if isinstance(given, Lazy):
            return _usable(_stored(given.read(), given.type))
        if given in values:
            return values[given]
        found = self._constants[given]
        if callable(found):
            found = self._constants[given] = found()
        return _usable(found)

    def _take_constant(self, operation: Operation) -> bool:
        """Keep a constant, or a lazy one: compressed weights are unpacked at first use."""
        name, kind = operation.outputs[0] if operation.outputs else ("", TensorType("unknown", ()))
        if operation.kind == "const":
            value = operation.attributes["val"]
            self._constants[name] = lambda: _stored(value.read(), kind)
            return True
        if operation.kind in CONSTEXPR:
            self._constants[name] = lambda: self._decompressed(operation, kind)
            return True
        return False

    def _decompressed(self, operation: Operation, kind: TensorType) -> Any:
        function = CONSTEXPR[operation.kind]
        given = {**operation.attributes, **{name: each[0] for name, each in operation.inputs.items()}}
        given.pop("name", None)
        arguments = {name: self._array(each) for name, each in given.items()}
        return _stored(np.asarray(function(**arguments)), kind)

    def _array(self, given: str | Lazy) -> Any:
        if isinstance(given, Lazy):
            found = given.read()
            return str(found) if given.type.dtype == "string" else found
        found = self._constants[given]
        if callable(found):
            found = self._constants[given] = found()
        return found.numpy() if isinstance(found, Tensor) else found

    def _last_uses(self) -> list[list[str]]:
        """For each operation, the values that nothing later needs."""
        needed, dead = set(self.outputs), []
        for operation in reversed(self._operations):
            used = {one for each in operation.inputs.values() for one in each if isinstance(one, str)}
            made = {name for name, _ in operation.outputs}
            dead.append(sorted((used | made) - needed - set(self._constants)))
            needed |= used
        return dead[::-1]


def _stored(value: Any, kind: TensorType) -> Any:
    """A constant as it is kept: a tensor in its own type, float16 where it is; a string as it is."""
    if kind.dtype == "string":
        return str(value)
    array = np.array(value)
    if kind.dtype == "float16":
        with np.errstate(over="ignore"):
            array = array.astype(np.float16)
    return torch.from_numpy(array if array.dtype != np.uint32 else array.astype(np.int64))


def _usable(stored: Any) -> Any:
    """A constant as operations take it: floats in float32."""
    return stored.float() if isinstance(stored, Tensor) and stored.dtype == torch.float16 else stored
