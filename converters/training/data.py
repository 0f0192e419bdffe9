"""The pictures the embedded model learns from: emoji artwork that npm packages carry with its licence.

Four sets draw the same concepts in four styles, so that a caption can name concept and style apart:

    3d       @iconify-json/fluent-emoji        MIT
    flat     @iconify-json/fluent-emoji-flat   MIT
    glossy   @iconify-json/noto                Apache-2.0
    cartoon  @iconify-json/twemoji             CC BY 4.0

Names and keywords come from emojibase-data (MIT). `prepare` rasterises every drawing once to 128x128 RGBA, into a
folder small enough to be carried to a machine with a GPU; `Artwork` composites the drawings on coloured backgrounds and
words their captions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sd.errors import InvalidRequest

SIZE = 128
STYLES = {
    "3d": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "glossy": "@iconify-json/noto",
    "cartoon": "@iconify-json/twemoji",
}
PACKAGES = {
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "emojibase-data": "17.0.0",
}
LANGUAGES = ("de", "fr", "es", "it")
# Two sets draw up to the edge; they get the margin that the other two have.
MARGINS = {"3d": 0, "flat": 0, "glossy": 8, "cartoon": 8}
# Groups of emojibase without people, components, symbols and flags.
GROUPS = (0, 3, 4, 5, 6, 7)
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 18),
    "gray": (150, 154, 160),
    "red": (214, 62, 62),
    "orange": (245, 150, 60),
    "yellow": (250, 218, 94),
    "green": (96, 176, 92),
    "teal": (64, 178, 176),
    "blue": (74, 128, 214),
    "purple": (142, 98, 190),
    "pink": (244, 164, 196),
    "brown": (140, 100, 72),
}
# The words people use where the data's label is stiff; both are taught.
PLAIN_NAMES = {
    "automobile": "car",
    "spouting whale": "whale",
    "locomotive": "steam train",
    "tangerine": "orange fruit",
    "doughnut": "donut",
    "hot beverage": "cup of coffee",
    "honeybee": "bee",
    "lady beetle": "ladybug",
    "sauropod": "dinosaur",
    "wrapped gift": "gift box",
    "locked": "padlock",
    "high voltage": "lightning bolt",
    "globe showing Americas": "planet earth",
    "evergreen tree": "pine tree",
    "deciduous tree": "tree",
    "ear of corn": "corn",
    "cheese wedge": "cheese",
    "pizza": "slice of pizza",
    "cooking": "fried egg in a pan",
    "soccer ball": "football",
    "game die": "dice",
    "mobile phone": "smartphone",
    "gem stone": "diamond",
    "crescent moon": "moon",
    "hourglass done": "hourglass",
    "blowfish": "pufferfish",
    "delivery truck": "truck",
    "fire engine": "fire truck",
    "flying saucer": "ufo",
    "vertical traffic light": "traffic light",
    "french fries": "fries",
    "jack-o-lantern": "halloween pumpkin",
    "hatching chick": "chick in an egg",
    "bullseye": "dartboard",
}


@dataclass(frozen=True)
class Concept:
    """One thing that all four styles draw: its label, its keywords and its icon's name in each set."""

    label: str
    group: int
    keywords: tuple[str, ...]
    icons: dict[str, str]


def _codepoints(hexcode: str) -> str:
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def install(folder: Path) -> Path:
    """Install the pinned npm packages into `folder` and return its node_modules."""
    npm = shutil.which("npm")
    if npm is None:
        raise InvalidRequest("npm was not found; it is needed once, to install the artwork")
    wanted = [f"{name}@{version}" for name, version in PACKAGES.items()]
    subprocess.run([npm, "install", "--prefix", str(folder), "--no-save", "--silent", *wanted], check=True)
    return folder / "node_modules"


def concepts(modules: Path) -> list[Concept]:
    """Every concept of GROUPS that all four sets draw, in emojibase's order."""
    icons: dict[str, dict[str, str]] = {}
    for style, package in STYLES.items():
        # The 3D set ships no code points, but its icons carry the flat set's names.
        source = STYLES["flat"] if style == "3d" else package
        chars = json.loads((modules / source / "chars.json").read_text("utf-8"))
        names = json.loads((modules / package / "icons.json").read_text("utf-8"))["icons"]
        icons[style] = {_codepoints(code): name for code, name in chars.items() if name in names}
    found = []
    for emoji in json.loads((modules / "emojibase-data/en/data.json").read_text("utf-8")):
        code = _codepoints(emoji["hexcode"])
        if emoji.get("group") in GROUPS and all(code in icons[style] for style in STYLES):
            names = {style: icons[style][code] for style in STYLES}
            found.append(Concept(emoji["label"], emoji["group"], tuple(emoji.get("tags", ())), names))
    return sorted(found, key=lambda concept: (concept.group, concept.label))


def translations(modules: Path) -> dict[str, dict[str, str]]:
    """language -> English label -> its name there, of all that emojibase names."""
    labels: dict[str, dict[str, str]] = {}
    for language in ("en", *LANGUAGES):
        rows = json.loads((modules / f"emojibase-data/{language}/data.json").read_text("utf-8"))
        labels[language] = {row["hexcode"]: row["label"] for row in rows}
    return {
        language: {labels["en"][code]: name for code, name in labels[language].items() if code in labels["en"]}
        for language in LANGUAGES
    }


def core_vocabulary() -> list[str]:
    """The labels the UNet is taught, from concepts.txt."""
    text = Path(__file__).with_name("concepts.txt").read_text("utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def spoken_names(label: str) -> list[str]:
    """What a concept is called in captions: its label, without "face" or "mark", and its plain name."""
    names = [label, label.removesuffix(" face").removesuffix(" mark")]
    if label in PLAIN_NAMES:
        names.append(PLAIN_NAMES[label])
    return list(dict.fromkeys(names))


def is_held_out(label: str, style: str) -> bool:
    """Whether the pair is kept from training (10 %, by a hash, so that adding a concept moves no other pair)."""
    return hashlib.sha256(f"{label}/{style}".encode()).digest()[0] < 26


def prepare(folder: Path, report: Callable[[str], None] = print) -> None:
    """Install the artwork, rasterise it, and leave in `folder`:

    artwork.npz    pixels: uint8 [N, 4, 128, 128, 4] (concepts, styles, height, width, RGBA)
    artwork.json   the concepts' names and keywords, all words of the emoji world, for the tokenizer, and the names
                   of things in LANGUAGES
    """
    with TemporaryDirectory() as scratch:
        modules = install(Path(scratch))
        found = concepts(modules)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "artwork.npz", pixels=_rasterise(found, modules, report))
        emoji = json.loads((modules / "emojibase-data/en/data.json").read_text("utf-8"))
        names = translations(modules)
    document = {
        "concepts": [{"label": c.label, "group": c.group, "keywords": list(c.keywords)} for c in found],
        "words": [word for row in emoji for word in (row["label"], *row.get("tags", ()))],
        "translations": names,
    }
    (folder / "artwork.json").write_text(json.dumps(document, indent=1, ensure_ascii=False), "utf-8")


def _rasterise(found: list[Concept], modules: Path, report: Callable[[str], None]) -> NDArray[np.uint8]:
    import resvg_py
    from PIL import Image

    pixels = np.zeros((len(found), len(STYLES), SIZE, SIZE, 4), np.uint8)
    for s, (style, package) in enumerate(STYLES.items()):
        icons = json.loads((modules / package / "icons.json").read_text("utf-8"))
        for n, concept in enumerate(found):
            icon = icons["icons"][concept.icons[style]]
            width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
            side = SIZE - 2 * MARGINS[style]
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{side}" height="{side}">{icon["body"]}</svg>'
            )
            png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
            drawing = Image.open(BytesIO(bytes(png))).convert("RGBA").resize((side, side))
            inside = slice(MARGINS[style], SIZE - MARGINS[style])
            pixels[n, s, inside, inside] = np.asarray(drawing)
        report(f"{style}: {len(found)} drawings")
    return pixels


def _shifted(pixels: NDArray[np.uint8], dy: int, dx: int) -> NDArray[np.uint8]:
    """`pixels` moved by (dy, dx), transparent where nothing was."""
    moved = np.roll(pixels, (dy, dx), (0, 1))
    moved[: max(dy, 0)] = moved[SIZE + min(dy, 0) :] = 0
    moved[:, : max(dx, 0)] = moved[:, SIZE + min(dx, 0) :] = 0
    return moved


class Artwork:
    """The rasterised drawings of a prepared folder, composited and captioned on demand."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "artwork.npz").is_file():
            raise InvalidRequest(f"{folder} holds no artwork.npz; make it with: edge-sd train data --work {folder}")
        self.pixels: NDArray[np.uint8] = np.load(folder / "artwork.npz")["pixels"]
        document: dict[str, Any] = json.loads((folder / "artwork.json").read_text("utf-8"))
        table = document["concepts"]
        self.words: list[str] = document["words"]
        self.translations: dict[str, dict[str, str]] = document.get("translations", {})
        self.labels = [row["label"] for row in table]
        self.keywords = {row["label"]: [word.replace("_", " ") for word in row["keywords"]] for row in table}
        self.index = {label: n for n, label in enumerate(self.labels)}

    def pairs(self, *, held_out: bool = False) -> Iterator[tuple[str, str]]:
        """The (concept, style) pairs of the core vocabulary that are trained on, or those that are not."""
        for label in core_vocabulary():
            for style in STYLES:
                if is_held_out(label, style) == held_out:
                    yield label, style

    def picture(self, label: str, style: str, background: Sequence[float], *, mirror: bool = False,
                shift: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:  # fmt: skip
        """One drawing on a plain background, float32 [3, 128, 128] in [-1, 1], moved by whole pixels (y, x)."""
        rgba = self._drawing(label, style, mirror, shift).astype(np.float32)
        alpha = rgba[..., 3:] / 255
        rgb = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
        return np.ascontiguousarray((rgb / 127.5 - 1).transpose(2, 0, 1))

    def silhouette(self, label: str, style: str, *, mirror: bool = False,
                   shift: tuple[int, int] = (0, 0)) -> NDArray[np.bool_]:  # fmt: skip
        """Where `picture` would show the drawing and not the background, bool [128, 128]."""
        inside: NDArray[np.bool_] = self._drawing(label, style, mirror, shift)[..., 3] > 127
        return inside

    def drawing(self, label: str, style: str) -> NDArray[np.uint8]:
        """The drawing alone, RGBA, uint8 [128, 128, 4]."""
        rgba: NDArray[np.uint8] = self.pixels[self.index[label], list(STYLES).index(style)]
        return rgba

    def _drawing(self, label: str, style: str, mirror: bool, shift: tuple[int, int]) -> NDArray[np.uint8]:
        rgba = self.drawing(label, style)
        return _shifted(rgba[:, ::-1] if mirror else rgba, *shift)

    def caption(
        self, label: str, style: str, background: str, rng: np.random.Generator, changes: Sequence[str] = (),
        adjective: str = "",
    ) -> str:  # fmt: skip
        """A caption in one of many wordings; one in ten is empty, which is what guidance needs.

        `changes` are words for what was done to the drawing ("mirrored"), `adjective` one that stands before its name.
        """
        if rng.random() < 0.1:
            return ""
        name = label
        if label in PLAIN_NAMES and rng.random() < 0.5:
            name = PLAIN_NAMES[label]
        elif rng.random() < 0.25:
            for ending in (" face", " mark"):
                name = name.removesuffix(ending)
        name = f"{adjective} {name}".strip()
        if rng.random() < 0.45:
            name = ("an " if name[0].lower() in "aeiou" else "a ") + name
        parts = []
        if rng.random() < 0.85:
            parts.append(f"{style} style" if rng.random() < 0.8 else style)
        if background != "white" or rng.random() < 0.25:
            parts.append(f"{background} background" if rng.random() < 0.8 else f"on {background}")
        if self.keywords[label] and rng.random() < 0.2:
            parts.append(str(rng.choice(self.keywords[label])))
        parts += changes
        rng.shuffle(parts)
        words = [name, *parts]
        if rng.random() < 0.15:
            rng.shuffle(words)
        return (", " if rng.random() < 0.85 else " ").join(words)
