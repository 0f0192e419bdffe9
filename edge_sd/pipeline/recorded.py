"""Recorded: what a picture's file says about how it was made, and the request that makes it again.

Reads our own JSON and the records of other programs (programs.py). Those have no exact request: what they name is
taken over, and what is not is said. A picture comes from anyone: it may name settings, models and files by name and
hash, and no path in it is ever opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.library import installed_models
from ..errors import InvalidRequest
from ..files import parse_json
from ..images.metadata import Texts, read_texts
from .control import Control, controls_of
from .infotext import Infotext, take
from .programs import read_program

if TYPE_CHECKING:
    from .request import Request
    from .settings import Settings

# Files that a picture was made from; it holds the hashes of their pixels.
SOURCES = ("image", "mask")
# The same, of which there may be several.
SEVERAL = {"controls": "control picture", "references": "reference picture"}
# The one setting that holds the name of a model.
REFINER = "refiner"
# What other programs call settings.
TITLES = {
    "strength": "Denoising strength",
    "image_guidance": "Image CFG scale",
    "mask_blur": "Mask blur",
    "mask_padding": "Masked area padding",
}


@dataclass(frozen=True)
class Recorded:
    """The parameters inside a picture's file.

    Args:
        path: The picture's file.
        settings: Names and values of Settings; for other programs' pictures those that their text names.
        exact: Whether edge-sd made it, so that `settings` are complete.
        text: AUTOMATIC1111's text, "" where there is none.
        model: Name of the model.
        model_hash: Hash that names the model's files.
        variant: The UNet's variant, where edge-sd made it.
        device: The UNet's device, where edge-sd made it.
        version: Version of the program.
        noise: Name of the noise that was handed in, "" where the seed makes it.
        others: Fields of another program that are none of a request's, as written.
        program: What wrote the record, where that was not edge-sd.
        for_image: Settings of other programs that take part once an image is given.
        for_mask: Settings of other programs that take part once a mask is given.
        unmet: What another program's record names and no request can, as notes.

    Example:
        again = read_recorded("apple.png").request(steps=30)
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
    noise: str = ""
    others: dict[str, str] = field(default_factory=dict)
    program: str = ""
    for_image: dict[str, Any] = field(default_factory=dict)
    for_mask: dict[str, Any] = field(default_factory=dict)
    unmet: tuple[str, ...] = ()

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
        for name, what in SEVERAL.items():
            hashes = self._hashes(name)
            if hashes and len(hashes) != len(given.get(name) or ()):
                made = f"{len(hashes)} {what}s" if len(hashes) > 1 else f"a {what}"
                raise InvalidRequest(
                    f"{self.path} was made with {made} whose pixels hash to {', '.join(hashes)}; "
                    f"give {'them' if len(hashes) > 1 else 'it'} again"
                )
        names = {*given.get("embeddings", {}), *(Path(path).stem for path in given.get("loras", {}))}
        for (kind, name), digest in self._files().items():
            if name not in names:
                weight = f", with the weight {self.settings['loras'][name][0]}" if kind == "LoRA" else ""
                raise InvalidRequest(
                    f"{self.path} was made with the {kind} {name!r} whose file hashes to {digest[:10]}; "
                    f"give that again{weight}"
                )
        self._check_names(given)
        try:
            again = {name: value for name, value in self.settings.items() if name not in ("embeddings", "loras")}
            return Request(**{**again, **self._awaited(given), **given})
        except InvalidRequest as error:  # It is a ValueError too.
            if given:
                raise
            raise InvalidRequest(f"{self.path} holds parameters that are damaged ({error})") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"{self.path} holds parameters that are damaged ({error})") from error

    def controls(self, images: Sequence[Any], **each: Sequence[Any] | None) -> tuple[Control, ...]:
        """The recorded controls with their pictures given again; `each`, as in controls_of, goes before the record.

        Raises InvalidRequest.
        """
        return controls_of(images, self.settings.get("controls") or (), **each)

    def _check_names(self, given: Mapping[str, Any]) -> None:
        """Refuse settings that this version lacks, or that would have files read which the caller did not name."""
        from .settings import Settings

        if unknown := set(self.settings) - {each.name for each in fields(Settings)}:
            raise InvalidRequest(
                f"{self.path} was made by edge-sd {self.version} with {min(unknown)!r}, which this version lacks"
            )
        refiner = self.settings.get(REFINER)
        if refiner is not None and REFINER not in given and refiner not in list(installed_models()):
            raise InvalidRequest(
                f"{self.path} was made with the refiner {str(refiner)[:80]!r}, which is not installed under that name; "
                "give its folder"
            )

    def _awaited(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that an image or a mask among `given` makes room for."""
        found = self.for_image if given.get("image") is not None else {}
        return {**found, **(self.for_mask if given.get("mask") is not None else {})}

    def notes(self, given: Mapping[str, Any]) -> list[str]:
        """What of another program's record the request made with `given` does not hold, a line each."""
        if self.exact:
            told = (
                f"{self.path.name} was drawn with noise of its own ({self.noise}), which no file holds; "
                "expect another picture"
            )
            return [told] if self.noise else []
        awaited = {**self.for_image, **self.for_mask}
        lacking = {name: value for name, value in awaited.items() if name not in {*self._awaited(given), *given}}
        told = ", ".join(f"{TITLES.get(name, name)} {value}" for name, value in lacking.items())
        what = "a mask" if given.get("image") is not None else "an image"
        notes = [f"{told}: {what} took part, which the file does not hold"] if told else []
        return [f"{self.path.name}, by {self.program}: {note}" for note in [*notes, *self.unmet]]

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

        for name, what in SEVERAL.items():
            hashes, others = self._hashes(name), [str(each.image) for each in getattr(settings, name)]
            if hashes and hashes != others:
                raise InvalidRequest(
                    f"{self.path} was made with another {what}: its pixels hash to {', '.join(hashes)}, "
                    f"those given to {', '.join(others)}"
                )
        found = _files({"embeddings": settings.embeddings, "loras": settings.loras})
        for (kind, name), digest in self._files().items():
            if found.get((kind, name)) != digest:
                raise InvalidRequest(
                    f"{self.path} was made with another {kind} {name!r}: its file hashes to {digest[:10]}, "
                    f"that given to {found.get((kind, name), 'nothing')[:10]}"
                )

    def _hashes(self, name: str) -> list[str]:
        """Of the pixels of several pictures, in their order. Raises InvalidRequest where there is no such list."""
        try:
            return [str(each["image"]) for each in self.settings.get(name) or ()]
        except (TypeError, KeyError) as error:
            raise InvalidRequest(f"{self.path} holds parameters that are damaged ({name}: {error})") from error

    def _files(self) -> dict[tuple[str, str], str]:
        return _files(self.settings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what is known, under the names of the request."""
        about = {
            name: getattr(self, name) for name in ("program", "version", "model", "model_hash", "variant", "device")
        }
        return {
            "exact": self.exact, "request": self.settings, **about, "others": self.others,
            "with_image": {**self.for_image, **self.for_mask}, "notes": list(self.unmet), "text": self.text,
        }  # fmt: skip


def _with_controls(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the first versions had flat fields: control, control_weight, …, one for all or a list."""
    old = {name: settings.pop(name) for name in list(settings) if name == "control" or name.startswith("control_")}
    if old.get("control") is None:
        return settings
    images = old["control"] if isinstance(old["control"], list) else [old["control"]]
    rows = [{"image": image} for image in images]
    for name in ("weight", "start", "end", "reading", "net"):
        values = old.get(f"control_{name}", getattr(Control(None), name))
        for n, row in enumerate(rows):
            row[name] = values[n if len(values) > 1 else 0] if isinstance(values, list) else values
    return {**settings, "controls": rows}


def _files(settings: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What kind of file, and its name -> the hash, of those that change the model."""
    words, loras = (settings.get(name) for name in ("embeddings", "loras"))
    found = {("embedding", str(word)): str(digest) for word, digest in words.items()} if isinstance(words, dict) else {}
    for name, row in loras.items() if isinstance(loras, dict) else ():
        # Pictures of earlier versions have one weight for both.
        if isinstance(row, list | tuple) and len(row) in (2, 3):
            found["LoRA", str(name)] = str(row[-1])
    return found


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def read_recorded(path: str | Path) -> Recorded:
    """How the picture in a file was made, by its own record.

    Raises InvalidRequest where it is no picture, damaged, or says nothing.

    Example:
        recorded = read_recorded("apple.png")
        print(recorded.program or "edge-sd", recorded.settings["prompt"])
        request = recorded.request(steps=30)
    """
    path = Path(path)
    found = read_texts(path)
    for name in ("edge_sd", "ImageDescription"):
        if '"request"' in (document := found.texts.get(name, "")):
            return _ours(path, document, found.texts.get("parameters") or found.texts.get("UserComment", ""))
    try:
        infotext = read_program(found)
    except ValueError as error:
        raise InvalidRequest(f"{path} cannot be read ({error})") from error
    if infotext is None:
        raise InvalidRequest(
            f"{path} holds no parameters: another program drew it, or saved it again without them; read are edge-sd's, "
            "AUTOMATIC1111's, ComfyUI's, InvokeAI's, NovelAI's, Fooocus', Easy Diffusion's, Draw Things', SwarmUI's "
            "and Mochi Diffusion's"
        )
    return _theirs(path, infotext, found)


def _ours(path: Path, text: str, parameters: str) -> Recorded:
    try:
        document = parse_json(text)
        settings = document["request"]
        if not isinstance(settings, dict) or not isinstance(settings.get("prompt"), str):
            raise TypeError("no prompt")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path} holds edge-sd parameters that are damaged ({error})") from error
    about: dict[str, Any] = {
        name: str(document.get(name, "")) for name in ("model", "model_hash", "variant", "device", "version", "noise")
    }
    return Recorded(path, _with_controls(settings), True, parameters, **about)


def _theirs(path: Path, infotext: Infotext, found: Texts) -> Recorded:
    from .request import Request

    try:
        taken = take(infotext, {each.name for each in fields(Request)})
    except ValueError as error:
        raise InvalidRequest(f"{path} holds parameters that are damaged ({error})") from error
    text = found.texts.get("parameters") or found.texts.get("UserComment", "")
    model, digest = (infotext.fields.get(name, "") for name in ("Model", "Model hash"))
    return Recorded(
        path, taken.settings, False, text, model, digest, others=taken.others, program=infotext.program,
        for_image=taken.for_image, for_mask=taken.for_mask, unmet=taken.notes,
    )  # fmt: skip
