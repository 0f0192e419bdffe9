"""Recorded: what a picture's file says about how it was made, and the request that makes it again.

Read are our own JSON (see image_io.py) and AUTOMATIC1111's text, which many programs write: a PNG's `parameters`, or
the EXIF UserComment of a JPEG or WebP. Others' text has no exact request; what it names is taken over.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DeviceError, InvalidRequest, MissingExtra, ModelNotFound, VariantNotFound
from ..images.files import EXIF_IFD, IMAGE_DESCRIPTION, USER_COMMENT
from ..sampling.names import find_sigmas

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .request import Request, Settings

# Files that a picture was made from; it holds the hashes of their pixels.
SOURCES = ("image", "mask", "control")
# AUTOMATIC1111's values hold commas only in quotes.
PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
NUMBERS = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
}


@dataclass(frozen=True)
class Recorded:
    """The parameters inside a picture's file.

    settings   names and values of request.Settings; of other programs' pictures those that their text names
    exact      whether edge-sd made it, so that `settings` are all there is
    text       AUTOMATIC1111's text, "" where there is none
    """

    path: Path
    settings: dict[str, Any]
    exact: bool
    text: str = ""
    model: str = ""
    model_hash: str = ""
    variant: str = ""
    device: str = ""
    version: str = ""
    others: dict[str, str] = field(default_factory=dict)

    def request(self, **given: Any) -> Request:
        """What makes the picture again; `given` goes before what was recorded.

        Raises InvalidRequest where a picture it was made from is not given, or a value makes no sense.
        """
        from .request import Request

        for name in SOURCES:
            if self.settings.get(name) is not None and given.get(name) is None:
                raise InvalidRequest(
                    f"{self.path} was made with {_a(name)} whose pixels hash to {self.settings[name]}; give that again"
                )
        names = {*given.get("embeddings", {}), *(Path(path).stem for path in given.get("loras", {}))}
        for (kind, name), digest in self._files().items():
            if name not in names:
                weight = f", with the weight {self.settings['loras'][name][0]}" if kind == "LoRA" else ""
                raise InvalidRequest(
                    f"{self.path} was made with the {kind} {name!r} whose file hashes to {digest[:10]}; "
                    f"give that again{weight}"
                )
        known = {each.name for each in fields(Request)}
        if unknown := set(self.settings) - known:
            raise InvalidRequest(
                f"{self.path} was made by edge-sd {self.version} with {min(unknown)!r}, which this version lacks"
            )
        try:
            again = {name: value for name, value in self.settings.items() if name not in ("embeddings", "loras")}
            return Request(**{**again, **given})
        except InvalidRequest:
            raise  # It is a ValueError too.
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"{self.path} holds parameters that are damaged ({error})") from error

    def open(
        self,
        model: str | None,
        device: str,
        variant: str | None,
        preference: str,
        tell: Callable[[str], None],
        low_memory: bool = False,
    ) -> Pipeline:
        """The pipeline that drew it, or the nearest to it; `tell` gets a line where that is another.

        Arguments are those of Pipeline.open and go before what was recorded. Raises what that raises, and
        ModelNotFound where the model has no such name here.
        """
        from ..bundle.library import installed_models
        from .pipeline import Pipeline

        if not self.exact:
            return Pipeline.open(model or "emoji", device, variant, preference, tell, low_memory=low_memory)
        if model is None and self.model not in installed_models():
            raise ModelNotFound(
                f"{self.path} was drawn by the model {self.model!r}, which is not installed under that name; "
                "give a name or a folder with --model"
            )

        def open_with(variant: str | None) -> Pipeline:
            name = model or self.model
            return Pipeline.open(name, device, variant, preference, tell, low_memory=low_memory)

        opened = None
        if variant is None and device == "auto":
            # Where its own variant can't run, another of the same weights draws nearly the same.
            with contextlib.suppress(DeviceError, VariantNotFound, MissingExtra):
                opened = open_with(self.variant)
        opened = opened or open_with(variant)
        found, bundle = opened.plan.variant, opened.bundle
        if found != self.variant:
            tell(f"note: {self.path} was drawn by variant {self.variant}, this is {found}; expect small differences")
        elif bundle.fingerprint(found) != self.model_hash:
            tell(f"note: the files of {bundle.name} are not those that drew {self.path}; expect another picture")
        return opened

    def check(self, settings: Settings) -> None:
        """Refuse `settings` made from other pictures than this one was."""
        for name in SOURCES:
            wanted, found = self.settings.get(name), getattr(settings, name)
            # JSON has lists where settings have tuples.
            found = list(found) if isinstance(found, tuple) else found
            if wanted is not None and found != wanted:
                raise InvalidRequest(
                    f"{self.path} was made with another {name}: its pixels hash to {wanted}, those given to {found}"
                )

        found = _files({"embeddings": settings.embeddings, "loras": settings.loras})
        for (kind, name), digest in self._files().items():
            if found.get((kind, name)) != digest:
                raise InvalidRequest(
                    f"{self.path} was made with another {kind} {name!r}: its file hashes to {digest[:10]}, "
                    f"that given to {found.get((kind, name), 'nothing')[:10]}"
                )

    def _files(self) -> dict[tuple[str, str], str]:
        return _files(self.settings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is known, under the names of the request."""
        about = {name: getattr(self, name) for name in ("version", "model", "model_hash", "variant", "device")}
        return {"exact": self.exact, "request": self.settings, **about, "others": self.others, "text": self.text}


def _files(settings: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What kind of file, and its name -> the hash, of those that change the model."""
    words, loras = (settings.get(name) for name in ("embeddings", "loras"))
    found = {("embedding", str(word)): str(digest) for word, digest in words.items()} if isinstance(words, dict) else {}
    for name, row in loras.items() if isinstance(loras, dict) else ():
        if isinstance(row, list | tuple) and len(row) == 2:
            found["LoRA", str(name)] = str(row[1])
    return found


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def read_recorded(path: Path) -> Recorded:
    """What `path` says. Raises InvalidRequest where it is no picture, damaged, or says nothing."""
    document, text = _read_chunks(path)
    if document:
        return _ours(path, document, text)
    if "Steps:" in text:
        return _theirs(path, text)
    raise InvalidRequest(
        f"{path} holds no parameters: another program drew it, or saved it again without them; "
        "read are edge-sd's and AUTOMATIC1111's"
    )


def _read_chunks(path: Path) -> tuple[str, str]:
    """Our JSON and AUTOMATIC1111's text, "" for what is not there."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as image:
            image.load()  # Chunks may follow the pixels, and a file that is cut short says so here.
            texts = {name: value for name, value in image.info.items() if isinstance(value, str)}
            exif = image.getexif()
            comment = exif.get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
            ours = texts.get("edge_sd", "") or str(exif.get(IMAGE_DESCRIPTION, ""))
    except UnidentifiedImageError:
        raise InvalidRequest(f"{path} is no PNG, JPEG or WebP picture, or a damaged one") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidRequest(f"{path} cannot be read ({reason})") from error
    text = texts.get("parameters", "") or _decode_comment(comment)
    return (ours if '"request"' in ours else ""), text


def _decode_comment(comment: bytes | str) -> str:
    """EXIF's UserComment: 8 bytes name the encoding. UTF-16 is big-endian unless it says so or plainly is not."""
    if isinstance(comment, str):
        return comment
    head, body = comment[:8], comment[8:]
    if head == b"UNICODE\0":
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return body.decode("utf-16", "replace")
        # Text in Latin letters has its zeros first when big-endian; some writers follow the file's own order instead.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    return (body if head in (b"ASCII\0\0\0", b"\0" * 8) else comment).decode("utf-8", "replace").strip("\0")


def _ours(path: Path, text: str, parameters: str) -> Recorded:
    try:
        document = json.loads(text)
        settings = document["request"]
        if not isinstance(settings, dict) or not isinstance(settings.get("prompt"), str):
            raise TypeError("no prompt")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} holds edge-sd parameters that are damaged ({error})") from error
    about: dict[str, Any] = {
        name: str(document.get(name, "")) for name in ("model", "model_hash", "variant", "device", "version")
    }
    return Recorded(path, settings, True, parameters, **about)


def _theirs(path: Path, text: str) -> Recorded:
    """AUTOMATIC1111's text: the prompt, a negative one, and a last line of `Steps: 20, Sampler: Euler a, …`."""
    *lines, last = text.strip().split("\n")
    if not last.startswith("Steps:"):
        lines, last = text.strip().split("\n"), ""
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    pairs = {key: value.strip('"').strip() for key, value in PAIR.findall(last)}
    settings: dict[str, Any] = {"prompt": prompt.strip(), "negative": negative.strip()}
    try:
        for key, (name, kind) in NUMBERS.items():
            if key in pairs:
                settings[name] = kind(pairs[key])
        if "Size" in pairs:
            settings["width"], settings["height"] = map(int, pairs["Size"].split("x"))
    except ValueError as error:
        raise InvalidRequest(f"{path} holds parameters that are damaged ({error})") from error
    if "Sampler" in pairs:
        settings["sampler"] = pairs["Sampler"]
    with contextlib.suppress(InvalidRequest, KeyError):
        settings["sigmas"] = find_sigmas(pairs["Schedule type"])
    taken = {*NUMBERS, "Size", "Sampler", "Model", "Model hash"}
    others = {key: value for key, value in pairs.items() if key not in taken}
    return Recorded(
        path, settings, False, text, pairs.get("Model", ""), pairs.get("Model hash", ""), others=others
    )  # fmt: skip
