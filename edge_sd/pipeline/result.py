"""Result: the pictures of a request, and all that is needed to make them again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..images.files import encode, save
from ..images.grids import grid
from .metadata import parameters_text, request_json
from .options import Place
from .settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One picture and the settings, with count 1, that make it again.

    Args:
        image: The picture, RGB.
        settings: What was drawn, nothing left open.
        model: Name of the model.
        variant: The UNet's variant.
        device: The UNet's device.
        model_hash: Ten hex digits that name the exact files of the variant.
        flagged: Whether the model's safety checker flagged it; it is black then.
        noise: Name of the noise that was handed in; "" is torch's, which the seed makes again.

    Example:
        picture = pipeline.generate("a red apple").pictures[0]
        picture.save("apple.jpg")
        print(picture.settings.seed, picture.device)
    """

    image: Image
    settings: Settings
    model: str
    variant: str
    device: str
    model_hash: str
    flagged: bool = False
    noise: str = ""

    def save(self, path: str | Path) -> Path:
        """Write PNG, JPEG or WebP by the name's ending, with the parameters inside; all or nothing."""
        return save(self.image, path, *self.texts())

    def encode(self, kind: str = "PNG", quality: int = 95) -> bytes:
        """The bytes of a PNG, JPEG or WEBP file with the parameters inside; `quality`, 1 to 100, is of the last two."""
        return encode(self.image, kind, *self.texts(), quality=quality)

    def texts(self) -> tuple[str, str]:
        """What the file says: AUTOMATIC1111's text, and the JSON of the exact request."""
        about = {name: getattr(self, name) for name in ("model", "model_hash", "variant", "device")}
        if self.noise:
            about["noise"] = self.noise
        return parameters_text(self.settings, self.model, self.model_hash), request_json(self.settings, about)


@dataclass(frozen=True)
class Result:
    """The pictures of a request, with the device plan and the time that they took.

    Args:
        pictures: In the order of their seeds.
        plan: The device plan in one line.
        seconds: "load", "denoise" and "decode" -> seconds, over all pictures.
        notes: What a person should know: components that moved, options without effect, words that were left out.

    Example:
        result = pipeline.generate("a red apple")
        result.save("apple.png")
        print(result.notes)
    """

    pictures: list[Picture]
    plan: str
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save(self, path: str | Path) -> list[Path]:
        """Write one picture to `path`, several to `path` with -1, -2, … before the ending."""
        path = Path(Place().check("output", path))
        if len(self.pictures) == 1:
            return [self.pictures[0].save(path)]
        return [p.save(path.with_stem(f"{path.stem}-{n}")) for n, p in enumerate(self.pictures, 1)]

    def save_grid(self, path: str | Path) -> Path:
        """Write all pictures as one, in rows, with the parameters of the whole inside."""
        return self.gridded().save(path)

    def gridded(self) -> Picture:
        """All pictures as one, in rows; its settings make all of them again."""
        first = self.pictures[0]
        # A variation's first picture counts its second seed on, so that the count makes all of them again.
        settings = replace(first.settings, count=len(self.pictures))
        return replace(first, image=grid([each.image for each in self.pictures]), settings=settings)
