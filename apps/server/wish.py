"""Wish: what a client asks for, as JSON. Every API turns its own form into one; the queue on disk holds them.

Clients name models, variants and LoRAs, and send pictures as bytes. No text of theirs is ever used as a path.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_sd.errors import InvalidRequest, choices
from edge_sd.pipeline.control import Control
from edge_sd.pipeline.request import MAX_PROMPT, MAX_SEED, MAX_STEPS, Request

if TYPE_CHECKING:
    from PIL.Image import Image

# A picture of a client may have so many pixels; decoding one takes 15 bytes of memory for each.
MAX_GIVEN_PIXELS = 4096 * 4096
# The same limit for what is drawn: larger ones belong to the command line.
MAX_DRAWN_PIXELS = 4096 * 4096
MAX_COUNT = 64
MAX_REFERENCES = 4
FORMATS = ("PNG", "JPEG", "WEBP")
# Fields that hold a picture in base64, or several -> what a Request and its Settings call them.
PICTURES = {"image": "image", "mask": "mask", "references": "references", "control": "controls"}
# Fields of Wish that are no fields of Request.
PLACE = ("model", "variant", "device", "preset")

Share = Annotated[float, Field(ge=0, le=1)]
Base64 = Annotated[str, Field(max_length=70_000_000, description="PNG, JPEG or WebP in base64; a data: URL also")]


class Wish(BaseModel):
    """A request and the model that draws it. Fields are those of `edge_sd.Request`; None is the model's default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
    negative: Annotated[str, Field(max_length=MAX_PROMPT)] = ""
    model: Annotated[str, Field(max_length=200, description="a name of /api/models; empty is the first")] = ""
    variant: Annotated[str, Field(max_length=200)] | None = None
    device: Annotated[str, Field(max_length=40, pattern=r"^[\w.:-]+$")] = "auto"
    preset: Annotated[str, Field(max_length=40)] = "exact"
    width: Annotated[int, Field(ge=8, le=4096)] | None = None
    height: Annotated[int, Field(ge=8, le=4096)] | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    sampler: Annotated[str, Field(max_length=80)] | None = None
    sigmas: Annotated[str, Field(max_length=80)] | None = None
    eta: Share | None = None
    s_churn: Annotated[float, Field(ge=0, le=100)] = 0.0
    s_noise: Annotated[float, Field(ge=0, le=2)] = 1.0
    count: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 1
    image: Base64 | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    mask: Base64 | None = None
    mask_blur: Annotated[float, Field(ge=0, le=64)] | None = None
    mask_padding: Annotated[int, Field(ge=0, le=4096)] | None = None
    references: Annotated[list[Base64], Field(max_length=MAX_REFERENCES)] = []
    reference_weight: Annotated[float, Field(ge=0, le=2)] | None = None
    control: Base64 | None = None
    control_weight: Annotated[float, Field(ge=0, le=2)] = 1.0
    control_start: Share = 0.0
    control_end: Share = 1.0
    control_reading: Literal["auto", "canny", "scribble", "lines", "grey", "tile"] = "auto"
    guidance_start: Share = 0.0
    guidance_end: Share = 1.0
    deep_every: Annotated[int, Field(ge=1, le=10)] | None = None
    merge_tokens: bool | None = None
    variation_seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    variation_strength: Share = 0.0
    decoder: Literal["full", "tiny", "auto"] | None = None
    clip_skip: Annotated[int, Field(ge=1, le=48)] = 1
    tile: Annotated[int, Field(ge=64, le=4096)] | None = None
    loras: Annotated[dict[str, float], Field(max_length=16)] = {}

    def seeded(self) -> Wish:
        """The wish with a seed of its own, so that a restart draws the same pictures."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": secrets.randbelow(MAX_SEED + 2 - self.count)})

    def request(self, lora_folder: Path | None = None) -> Request:
        """The whole as one request. Raises InvalidRequest for values, pictures or LoRAs that cannot be used."""
        from edge_sd.pipeline.presets import preset_named

        given = self.model_dump(exclude={*PLACE, *PICTURES, "loras"}, exclude_none=True)
        given = {**preset_named(self.preset).changes, **given}
        if (self.width or 1) * (self.height or 1) > MAX_DRAWN_PIXELS:
            raise InvalidRequest(f"{self.width}x{self.height} has more than {MAX_DRAWN_PIXELS} pixels")
        for name in ("image", "mask", "control"):
            if (text := getattr(self, name)) is not None:
                given[name] = open_given(decode_base64(text, name), name)
        what = "reference picture"
        given["references"] = [open_given(decode_base64(text, what), what) for text in self.references]
        flat = {name: given.pop(f"control_{name}") for name in ("weight", "start", "end", "reading")}
        if "control" in given:
            given["controls"] = [Control(given.pop("control"), **flat)]
        if self.loras:
            given["loras"] = {find_lora(lora_folder, name): weight for name, weight in self.loras.items()}
        return Request(**given, lora_folder=lora_folder)

    def requests(self, lora_folder: Path | None = None) -> list[Request]:
        """One request for each picture."""
        whole = replace(self.request(lora_folder), count=self.count)
        return [whole.nth(n) for n in range(self.count)]


def decode_base64(text: str, what: str) -> bytes:
    """The bytes of base64 or of a data: URL. Raises InvalidRequest; no other URL is ever fetched."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"the {what} is neither base64 nor a data: URL of base64") from None


def open_given(data: bytes, what: str) -> Image:
    """A client's picture in RGB, upright, on white where it is transparent. Raises InvalidRequest."""
    return on_white(open_raw(data, what))


def open_raw(data: bytes, what: str) -> Image:
    """A client's picture, upright, as its file has it. Raises InvalidRequest before much memory is taken."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_GIVEN_PIXELS:
                size = f"{image.width}x{image.height}"
                raise InvalidRequest(f"the {what} has {size} pixels; at most {MAX_GIVEN_PIXELS} are taken")
            if getattr(image, "n_frames", 1) > 1:
                raise InvalidRequest(f"the {what} is animated; give one picture")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise InvalidRequest(f"the {what} is not a PNG, JPEG or WebP picture") from None
    except InvalidRequest:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise InvalidRequest(f"the {what} is damaged: it could not be decoded") from None


def on_white(image: Image) -> Image:
    """RGB; what was transparent becomes white, since the colours under it are arbitrary."""
    from PIL import Image as Images

    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Images.alpha_composite(Images.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def loras_in(folder: Path | None) -> dict[str, Path]:
    """Name -> file of the LoRAs that the server offers."""
    if folder is None:
        return {}
    return {path.stem: path for path in sorted(folder.rglob("*.safetensors")) if path.is_file()}


def find_lora(folder: Path | None, name: str) -> Path:
    """The file of a LoRA by its name alone. Raises InvalidRequest."""
    there = loras_in(folder)
    if name not in there:
        raise InvalidRequest(f"no LoRA {name[:80]!r}; valid: {choices(there)}")
    return there[name]


def as_base64(data: bytes) -> str:
    """Bytes as JSON carries them."""
    return base64.b64encode(data).decode("ascii")


def png_base64(image: Any) -> str:
    """A PIL picture as a wish carries it."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return as_base64(buffer.getvalue())
