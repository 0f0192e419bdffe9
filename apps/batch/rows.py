"""Rows: the lines of a .csv, .jsonl or .txt file as requests. All are read and checked before anything is drawn."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sd.errors import InvalidRequest, choices
from edge_sd.pipeline.request import Request

from ..request_options import fields_of, row_options

KINDS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
# What may stand between the cells of a .csv; programs write what their user's country has for it.
DELIMITERS = ",;\t"
# Between several values of one cell.
SEVERAL = "|"
YES, NO = ("true", "yes", "1"), ("false", "no", "0")
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Row:
    """One line: `where` names it in messages, `number` counts rows from 1, `fields` are those of Request that it gives.

    `request` is of the fields; its seed is None where the row leaves it open.
    """

    where: str
    number: int
    fields: dict[str, Any]
    request: Request


def read_rows(source: str, kind: str | None, shared: dict[str, Any]) -> list[Row]:
    """The rows of a file, or of standard input for "-". `shared` are options for rows that leave them open.

    `kind` is "csv", "jsonl" or "txt"; None goes by the name's ending, and "-" is text unless its first line is JSON.
    Raises InvalidRequest, naming the line.
    """
    text = _read(source)
    kind = _kind(source, kind, text)
    name = "standard input" if source == "-" else Path(source).name
    lines = {"csv": _csv, "jsonl": _jsonl, "txt": _txt}[kind](text, name)
    rows = [_row(f"{name} line {line}", n, given, shared) for n, (line, given) in enumerate(lines, 1)]
    if not rows:
        raise InvalidRequest(f"{name} holds no rows: there is nothing to draw")
    return rows


def _read(source: str) -> str:
    try:
        data = sys.stdin.buffer.read(MAX_BYTES + 1) if source == "-" else Path(source).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{source} cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise InvalidRequest(f"{source} has more than {MAX_BYTES >> 20} MiB; give it in parts")
    try:
        # Spreadsheets begin UTF-8 with a mark.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidRequest(f"{source} line {line} is not valid UTF-8; save the file as UTF-8") from None


def _kind(source: str, kind: str | None, text: str) -> str:
    valid = sorted({*KINDS.values()})
    if kind is not None:
        if kind not in valid:
            raise InvalidRequest(f"unknown kind of rows {kind!r}; valid: {choices(valid)}")
        return kind
    if source == "-":
        try:
            return "jsonl" if isinstance(json.loads(text.strip().partition("\n")[0]), dict) else "txt"
        except (ValueError, RecursionError):
            return "txt"
    ending = Path(source).suffix.lower()
    if ending not in KINDS:
        raise InvalidRequest(f"{source}: rows are read from {choices(KINDS)}; say which with --rows csv, jsonl or txt")
    return KINDS[ending]


def _txt(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that is not empty is a prompt."""
    # Only these end a line; splitlines would cut at other characters, which prompts may hold.
    for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if line.strip():
            yield n, {"prompt": line.strip()}


def _jsonl(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name} line {n} is not valid JSON: {error}") from None
        if not isinstance(found, dict):
            raise InvalidRequest(f"{name} line {n} holds a {type(found).__name__}, not a JSON object")
        yield n, found


def _csv(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first line names the columns; an empty cell leaves its option open."""
    head = text.partition("\n")[0]
    delimiter = max(DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidRequest(f"{name} line {line}: {error}") from None
        if not any(cell.strip() for cell in cells):
            continue
        if not columns:
            columns = [cell.strip() for cell in cells]
            if twice := [each for each in columns if columns.count(each) > 1]:
                raise InvalidRequest(f"{name} has two columns {twice[0]!r}")
            continue
        if len(cells) != len(columns):
            raise InvalidRequest(f"{name} line {line} has {len(cells)} cells, its first line {len(columns)} columns")
        yield line, {column: cell for column, cell in zip(columns, cells, strict=True) if cell.strip()}


def _row(where: str, number: int, given: dict[str, Any], shared: dict[str, Any]) -> Row:
    try:
        fields = _fields(given, shared)
        return Row(where, number, fields, Request(**fields))
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from None


def _fields(given: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Fields of Request of what a row says, under the names of the command's options."""
    known = row_options()
    wishes, own = dict(shared), dict[str, Any]()
    for column, value in given.items():
        name = column.strip().lower().lstrip("-").replace("-", "_").replace(" ", "_")
        if name not in known:
            raise InvalidRequest(f"unknown option {column[:80]!r}; valid: {choices(known)}")
        if name in own:
            raise InvalidRequest(f"{name} is given twice")
        if value is not None:
            own[name] = _value(name, value, *known[name])
    sides: dict[str, Any] = {name: own.pop(name) for name in ("width", "height") if name in own}
    if sides:
        if "size" in own:
            raise InvalidRequest("size is given beside width or height; give one of them")
        wishes["size"] = None
    prompt = own.pop("prompt", None)
    if prompt is None:
        raise InvalidRequest("there is no prompt: say what to draw")
    return {**fields_of({**wishes, **own}), **sides, "prompt": prompt}


def _value(name: str, value: Any, kind: type, several: bool) -> Any:
    if several:
        listed = value.split(SEVERAL) if isinstance(value, str) else value if isinstance(value, list) else [value]
        return [_one(name, each, kind) for each in listed]
    return _one(name, value, kind)


def _one(name: str, value: Any, kind: type) -> Any:
    """A cell's text, or a value of JSON, as an option of `kind`."""
    if isinstance(value, list | dict):
        raise InvalidRequest(f"{name} is {type(value).__name__}, not one value")
    if kind is bool:
        text = str(value).strip().lower()
        if text not in (*YES, *NO):
            raise InvalidRequest(f"{name} {value!r} is neither true nor false")
        return text in YES
    if kind in (int, float):
        if isinstance(value, str):
            try:
                return kind(value.strip())
            except ValueError:
                what = "whole number" if kind is int else "number"
                raise InvalidRequest(f"{name} {value[:80]!r} is not a {what}") from None
        # What JSON has is checked as it is: 20.5 steps are not 20.
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InvalidRequest(f"{name} is {json.dumps(value)}, not a text")
    return kind(value)
