"""The few protobuf messages that an ML Program is made of, read without a protobuf library.

Importing coremltools for its generated classes takes seconds; the wire format is a page
(https://protobuf.dev/programming-guides/encoding), and field numbers never change their meaning (coremltools'
mlmodel/format/MIL.proto and Model.proto). Fields that are not named here are skipped.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# message -> field number -> (name, kind). Kinds: "int", "str", "bytes", "f4", "f8", "i" (a packed list of one of
# them: "[f4]", "[f8]", "[int]"), "[str]", a message's name, "[Message]" for a list, "{Message}" for a map of strings.
SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {1: ("specificationVersion", "int"), 2: ("description", "Description"), 502: ("mlProgram", "Program")},
    "Description": {21: ("defaultFunctionName", "str")},
    "Program": {1: ("version", "int"), 2: ("functions", "{Function}")},
    "Function": {1: ("inputs", "[NamedValueType]"), 2: ("opset", "str"), 3: ("block_specializations", "{Block}")},
    "Block": {2: ("outputs", "[str]"), 3: ("operations", "[Operation]")},
    "Operation": {
        1: ("type", "str"),
        2: ("inputs", "{Argument}"),
        3: ("outputs", "[NamedValueType]"),
        4: ("blocks", "[Block]"),
        5: ("attributes", "{Value}"),
    },
    "Argument": {1: ("arguments", "[Binding]")},
    "Binding": {1: ("name", "str"), 2: ("value", "Value")},
    "NamedValueType": {1: ("name", "str"), 2: ("type", "ValueType")},
    "ValueType": {1: ("tensorType", "TensorType")},
    "TensorType": {1: ("dataType", "int"), 2: ("rank", "int"), 3: ("dimensions", "[Dimension]")},
    "Dimension": {1: ("constant", "ConstantDimension")},
    "ConstantDimension": {1: ("size", "int")},
    "Value": {2: ("type", "ValueType"), 3: ("immediateValue", "Immediate"), 5: ("blobFileValue", "BlobFile")},
    "BlobFile": {1: ("fileName", "str"), 2: ("offset", "int")},
    "Immediate": {1: ("tensor", "TensorValue")},
    "TensorValue": {
        1: ("floats", "Floats"),
        2: ("ints", "Ints"),
        3: ("bools", "Ints"),
        4: ("strings", "Strings"),
        5: ("longInts", "Ints"),
        6: ("doubles", "Doubles"),
        7: ("bytes", "Bytes"),
    },
    "Floats": {1: ("values", "[f4]")},
    "Doubles": {1: ("values", "[f8]")},
    "Ints": {1: ("values", "[int]")},
    "Strings": {1: ("values", "[str]")},
    "Bytes": {1: ("values", "bytes")},
}
_MAP_ENTRY = {1: ("key", "str")}


class WireError(ValueError):
    """The bytes are no protobuf message of this kind."""


def decode(message: str, data: bytes) -> dict[str, Any]:
    """The fields of a message by name; lists and maps are there even when empty. Raises WireError."""
    try:
        return _decode(SCHEMA[message], memoryview(data))
    except (IndexError, struct.error, RecursionError, ValueError, TypeError, AttributeError) as error:
        # TypeError: a number where a message belongs, or the other way round.
        raise WireError(f"no {message}: {error}") from error


def _decode(fields: dict[int, tuple[str, str]], data: memoryview) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in fields.values():
        if kind[0] in "[{":
            found[name] = {} if kind[0] == "{" else []
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value, at = _value(tag & 7, data, at)
        if tag >> 3 not in fields:
            continue
        name, kind = fields[tag >> 3]
        if kind[0] == "{":
            entry = _decode({**_MAP_ENTRY, 2: ("value", kind[1:-1])}, value)
            found[name][entry.get("key", "")] = entry.get("value", {})
        elif kind[0] == "[":
            found[name] += _list(kind[1:-1], tag & 7, value)
        else:
            found[name] = _single(kind, value)
    return found


def changed(data: bytes | memoryview, path: Sequence[int], change: Callable[[bytes], bytes]) -> bytes:
    """`data` with `change` done to every field that `path`, numbers from the outermost message on, leads to.

    All other fields, those that are not known too, stay as they are and where they are. Raises WireError.
    """
    view, at, made = memoryview(data), 0, bytearray()
    while at < len(view):
        start = at
        try:
            tag, at = _varint(view, at)
            value, at = _value(tag & 7, view, at)
        except IndexError as error:
            raise WireError("it ends too early") from error
        if tag >> 3 != path[0] or tag & 7 != 2:
            made += view[start:at]
        else:
            made += field(path[0], changed(value, path[1:], change) if path[1:] else change(bytes(value)))
    return bytes(made)


def field(number: int, value: int | bytes | str) -> bytes:
    """One field: a number, or bytes, which a text or an encoded message are."""
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    data = value.encode() if isinstance(value, str) else value
    return _encoded(number << 3 | 2) + _encoded(len(data)) + data


def _encoded(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise WireError("a number of more than 64 bits")


def _value(wire: int, data: memoryview, at: int) -> tuple[Any, int]:
    if wire == 0:
        return _varint(data, at)
    if wire == 2:
        length, at = _varint(data, at)
    elif wire in (1, 5):
        length = 8 if wire == 1 else 4
    else:
        raise WireError(f"wire type {wire}")
    if at + length > len(data):
        raise WireError("it ends too early")
    return data[at : at + length], at + length


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _single(kind: str, value: Any) -> Any:
    if kind == "int":
        return _signed(value)
    if kind == "str":
        return bytes(value).decode()
    if kind == "bytes":
        return bytes(value)
    return _decode(SCHEMA[kind], value)


def _list(kind: str, wire: int, value: Any) -> list[Any]:
    if kind in ("f4", "f8"):
        floats: list[float] = np.frombuffer(value, f"<{kind}").tolist()
        return floats
    if kind == "int":
        if wire == 0:
            return [_signed(value)]
        numbers, at = [], 0
        while at < len(value):
            number, at = _varint(value, at)
            numbers.append(_signed(number))
        return numbers
    return [_single(kind, value)]
