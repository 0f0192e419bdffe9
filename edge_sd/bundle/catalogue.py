"""Repositories of the hub that hold models of these families by their pages, and how their makers draw with them.

A repository's configs say what a model is, but not in how few steps it was taught to draw, nor without guidance. That
stands on the model's card, or in the documentation of the program that it was made for; each row cites where. The
defaults go into the record of a pull (hub.json), where they are facts of that model. Nothing looks at a name again.

No row was tried: the hub could not be reached where this was written. `checked` names the facts of a row that were read
in stored copies of what it cites, of the maker's own example, or of the hub's page of the repository. The others are
from memory, and want checking there. `edge-sd run` says the real size and licence, as the hub lists them, before it
pulls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .facts import Family


Form = Literal["torch", "openvino", "coreml"]
CARD = "https://huggingface.co/"
DIFFUSERS = "https://huggingface.co/docs/diffusers/main/en/"


@dataclass(frozen=True)
class Entry:
    """A repository.

    name       ORG/NAME
    family     sd1, sd2, sdxl, sd3 or sana
    form       what it holds: torch (diffusers' safetensors), openvino (optimum-intel's export), coreml (Apple's)
    gigabytes  of the files that are pulled, roughly
    license    as its card names it
    source     where steps, guidance and sampler are said
    steps, guidance, size, sampler   None is what the model's own configs say; a guidance of 1 is none
    openvino   another repository with an export of the same weights
    checked    the fields that were read where they are said
    """

    name: str
    family: Family
    form: Form
    gigabytes: float
    license: str
    source: str
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    sampler: str | None = None
    openvino: str | None = None
    checked: tuple[str, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """Those of a request that differ from what the model's configs say."""
        sides = {"width": self.size, "height": self.size}
        known = {**sides, "steps": self.steps, "guidance": self.guidance, "sampler": self.sampler}
        return {name: value for name, value in known.items() if value is not None}


def _card(name: str, family: Family, form: Form, gigabytes: float, license: str, **defaults: Any) -> Entry:
    """A row whose source is the repository's own card."""
    return Entry(name, family, form, gigabytes, license, f"{CARD}{name}", **defaults)


TURBO = f"{DIFFUSERS}using-diffusers/sdxl_turbo"
FASTSD = "https://github.com/rupeshs/fastsdcpu"
SAI = "stabilityai-ai-community"
OPENRAIL = "creativeml-openrail-m"
# What was read of a row: the hub's label, the maker's example, the files.
LABEL, EXAMPLE, FILES = ("license",), ("steps", "guidance"), ("gigabytes",)
CATALOGUE = (
    # Stable Diffusion 1, and smaller UNets distilled from it.
    _card("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd1", "torch", 2.7, OPENRAIL,
          openvino="OpenVINO/stable-diffusion-v1-5-int8-ov"),
    _card("CompVis/stable-diffusion-v1-4", "sd1", "torch", 2.7, OPENRAIL),
    _card("Lykon/dreamshaper-8", "sd1", "torch", 2.7, OPENRAIL, steps=25, checked=LABEL),
    # Their cards' example takes diffusers' 50 steps; their figures are of pictures in 25.
    _card("nota-ai/bk-sdm-small", "sd1", "torch", 2.0, OPENRAIL, steps=25, checked=(*LABEL, "steps")),
    _card("nota-ai/bk-sdm-tiny", "sd1", "torch", 1.7, OPENRAIL, steps=25, checked=LABEL),
    # One to four steps.
    _card("SimianLuo/LCM_Dreamshaper_v7", "sd1", "torch", 5.5, "mit", steps=4, guidance=8.0,
          openvino="OpenVINO/LCM_Dreamshaper_v7-int8-ov", checked=(*LABEL, *FILES)),
    _card("stabilityai/sd-turbo", "sd2", "torch", 2.6, SAI, steps=1, guidance=1.0, size=512,
          openvino="rupeshs/sd-turbo-openvino", checked=(*EXAMPLE, "size")),
    Entry("stabilityai/sdxl-turbo", "sdxl", "torch", 6.9, "sai-nc-community", TURBO, steps=1, guidance=1.0, size=512,
          openvino="rupeshs/sdxl-turbo-openvino-int8", checked=(*LABEL, *EXAMPLE, "size")),
    _card("IDKiro/sdxs-512-0.9", "sd2", "torch", 2.4, "openrail++", steps=1, guidance=1.0, size=512,
          openvino="rupeshs/sdxs-512-0.9-openvino", checked=(*LABEL, *EXAMPLE)),
    _card("IDKiro/sdxs-512-dreamshaper", "sd1", "torch", 2.1, "openrail++", steps=1, guidance=1.0, size=512,
          checked=LABEL),
    # SDXL.
    _card("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "torch", 6.9, "openrail++", size=1024, checked=LABEL),
    # Stable Diffusion 3.5. The hub wants its terms accepted first.
    _card("stabilityai/stable-diffusion-3.5-medium", "sd3", "torch", 16.3, SAI, steps=40, guidance=4.5, size=1024,
          checked=(*LABEL, *FILES)),
    _card("stabilityai/stable-diffusion-3.5-large-turbo", "sd3", "torch", 28.0, SAI, steps=4, guidance=1.0, size=1024,
          checked=(*EXAMPLE, "size")),
    # SANA-Sprint: its maker's licence, and Gemma's terms for the text encoder.
    Entry("Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", "sana", "torch", 9.7, "nscl-v2-custom",
          "https://nvlabs.github.io/Sana/docs/sana_sprint", steps=2, guidance=4.5, size=1024, checked=("steps",)),
    # Exports of optimum-intel: no torch, no conversion.
    _card("OpenVINO/stable-diffusion-v1-5-int8-ov", "sd1", "openvino", 1.1, OPENRAIL, checked=(*LABEL, *FILES)),
    _card("OpenVINO/stable-diffusion-v1-5-fp16-ov", "sd1", "openvino", 2.1, OPENRAIL),
    _card("OpenVINO/LCM_Dreamshaper_v7-int8-ov", "sd1", "openvino", 1.1, "mit", steps=4, guidance=8.0, checked=LABEL),
    _card("OpenVINO/LCM_Dreamshaper_v7-fp16-ov", "sd1", "openvino", 2.1, "mit", steps=4, guidance=8.0,
          checked=(*LABEL, *FILES)),
    Entry("rupeshs/sd-turbo-openvino", "sd2", "openvino", 2.6, "unknown", FASTSD, steps=1, guidance=1.0, size=512,
          checked=EXAMPLE),
    # It has no label on the hub, and a LICENSE.TXT.
    Entry("rupeshs/sdxl-turbo-openvino-int8", "sdxl", "openvino", 4.7, "its LICENSE.TXT", FASTSD, steps=1,
          guidance=1.0, size=512, checked=(*LABEL, *FILES)),
    Entry("rupeshs/sdxs-512-0.9-openvino", "sd2", "openvino", 1.6, "unknown", FASTSD, steps=1, guidance=1.0, size=512),
    # Core ML, for Macs.
    _card("apple/coreml-stable-diffusion-v1-4", "sd1", "coreml", 2.7, "other"),
    _card("apple/coreml-stable-diffusion-v1-5", "sd1", "coreml", 2.7, "other", checked=LABEL),
    _card("apple/coreml-stable-diffusion-2-base", "sd2", "coreml", 2.6, "other", checked=LABEL),
    _card("apple/coreml-stable-diffusion-2-1-base", "sd2", "coreml", 2.6, "openrail++", checked=LABEL),
)  # fmt: skip


def known(name: str) -> Entry | None:
    """The row of a repository; the hub does not tell small letters from capitals."""
    return next((each for each in CATALOGUE if each.name.lower() == name.lower()), None)
