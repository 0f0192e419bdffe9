"""What AUTOMATIC1111's clients send, in our words.

Of its many fields some change the picture and are done, some are neutral by their usual value, and some ask for what
is not offered here. The last are refused by name; fields that are not known at all are named in the answer's notes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from edge_sd.errors import InvalidRequest
from edge_sd.pipeline.request import MAX_PROMPT, MAX_SEED, MAX_STEPS

from .wish import MAX_COUNT, Base64, Wish, decode_base64, open_given, png_base64

if TYPE_CHECKING:
    from PIL.Image import Image

# Fields that ask for what is not offered, unless they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "enable_hr": (False, None), "restore_faces": (False, None), "tiling": (False, None), "styles": ([], None),
    "script_name": (None, ""), "infotext": (None, ""), "refiner_checkpoint": (None, "", "None"),
    "seed_resize_from_h": (-1, 0, None), "seed_resize_from_w": (-1, 0, None), "s_tmin": (0, None),
    "s_min_uncond": (0, None), "initial_noise_multiplier": (1, None),
    "latent_mask": (None,), "hr_checkpoint_name": (None, ""), "firstpass_image": (None,),
}  # fmt: skip
# Fields without effect where those above are neutral, or whose effect is not on the picture.
IDLE = {
    "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "hr_sampler_name", "hr_scheduler",
    "hr_prompt", "hr_negative_prompt", "hr_additional_modules", "hr_cfg", "firstphase_width", "firstphase_height",
    "script_args", "s_tmax", "refiner_switch_at", "do_not_save_samples", "do_not_save_grid", "disable_extra_networks",
    "comments", "force_task_id", "image_cfg_scale", "override_settings_restore_afterwards", "subseed",
}  # fmt: skip
READINGS = {"none": "auto", "canny": "canny", "invert": "scribble", "lineart": "auto", "scribble": "scribble",
            "tile": "tile"}  # fmt: skip
AUTOMATIC = ("", "automatic")
# How much noise a sampler adds on its way, and what is none of it: looked at by samplers that have it alone.
STOCHASTIC: dict[str, tuple[Any, ...]] = {"eta": (None,), "s_churn": (None, 0), "s_noise": (None, 1)}
# What the ControlNet of a model is called.
CONTROLNET = "controlnet"
# Options that clients send although they have one value here.
FIXED: dict[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""), "samples_format": ("png",), "forge_additional_modules": ([],),
}  # fmt: skip


class Options:
    """The server's options that clients read and set. Those that are not listed cannot be set."""

    def __init__(self, names: list[str], model: str, clip_skip: int = 1) -> None:
        self.names, self.model, self.clip_skip = names, model, clip_skip

    def view(self) -> dict[str, Any]:
        """All of them."""
        return {
            **{name: values[0] for name, values in FIXED.items()},
            "sd_model_checkpoint": self.model,
            "CLIP_stop_at_last_layers": self.clip_skip,
        }

    def changed(self, wanted: dict[str, Any]) -> Options:
        """These with some changed. Raises InvalidRequest for an option or a value that is not offered."""
        model, clip_skip = self.model, self.clip_skip
        for name, value in wanted.items():
            if name == "sd_model_checkpoint":
                model = self.find(str(value))
            elif name == "CLIP_stop_at_last_layers":
                if type(value) is not int or not 1 <= value <= 48:
                    raise InvalidRequest(f"{name} is not a whole number from 1 to 48")
                clip_skip = value
            elif value is not None and value not in FIXED.get(name, ()):
                able = ", ".join(f"{key}: {' or '.join(map(str, values))}" for key, values in FIXED.items())
                valid = f"sd_model_checkpoint, CLIP_stop_at_last_layers, {able}"
                raise InvalidRequest(f"the option {name[:80]!r} cannot be set so here; valid: {valid}")
        return Options(self.names, model, clip_skip)

    def find(self, title: str) -> str:
        """The model of a title, "emoji" or "emoji [0123456789]". Raises InvalidRequest."""
        name = re.sub(r" \[[0-9a-f]{1,64}\]$", "", title)
        if name not in self.names:
            raise InvalidRequest(f"no model {name[:80]!r}; valid: {', '.join(self.names)}")
        return name


class Body(BaseModel):
    """Fields of both routes that have an effect; others are looked at by name."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=MAX_PROMPT)] = ""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT)] | None = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = -1
    subseed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = -1
    subseed_strength: Annotated[float, Field(ge=0, le=1)] | None = 0
    sampler_name: Annotated[str, Field(max_length=80)] | None = None
    sampler_index: Annotated[str, Field(max_length=80)] | None = None
    scheduler: Annotated[str, Field(max_length=80)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = 1
    n_iter: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = 1
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    width: Annotated[int, Field(ge=8, le=4096)] | None = None
    height: Annotated[int, Field(ge=8, le=4096)] | None = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    s_churn: Annotated[float, Field(ge=0, le=100)] | None = None
    s_noise: Annotated[float, Field(ge=0, le=2)] | None = None
    clip_skip: Annotated[int, Field(ge=0, le=48)] | None = None
    override_settings: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    override_settings_restore_afterwards: bool | None = True
    send_images: bool | None = True
    save_images: bool | None = False
    alwayson_scripts: Annotated[dict[str, Any], Field(max_length=64)] | None = None

    def wish(self, options: Options) -> Wish:
        """The same in our words, with the server's options where the request has none. Raises InvalidRequest."""
        for name, neutral in NEUTRAL.items():
            value = self._other(name)
            if value not in neutral:
                raise InvalidRequest(f"{name} is not offered by this server; leave it out")
        options = options.changed(self.override_settings or {})
        model, _, variant = options.model.partition(":")
        sampler = self.sampler_name or self.sampler_index
        strength = self.subseed_strength or 0.0
        scheduler = self.scheduler if (self.scheduler or "").lower() not in AUTOMATIC else None
        given: dict[str, Any] = {
            "steps": self.steps, "guidance": self.cfg_scale, "seed": _given(self.seed), "sampler": sampler,
            "sigmas": scheduler, "width": self.width, "height": self.height,
            "variation_seed": _given(self.subseed) if strength else None, **self._pictures(), **self._control(),
            **{name: getattr(self, name) for name in self._stochastic()[0]},
        }  # fmt: skip
        return Wish(
            prompt=self.prompt or " ", negative=self.negative_prompt or "", model=model, variant=variant or None,
            count=_count(self), variation_strength=strength, clip_skip=self.clip_skip or options.clip_skip,
            **{name: value for name, value in given.items() if value is not None},
        )  # fmt: skip

    def notes(self) -> list[str]:
        """What had no effect, by name."""
        unknown = {*(self.model_extra or {})} - {*NEUTRAL, *IDLE}
        told = [f"{name[:80]} is not known here and had no effect" for name in sorted(unknown)]
        idle_scripts = [name for name, args in self._scripts().items() if args and name.lower() != "controlnet"]
        told += [f"the script {name[:80]!r} is not known here and had no effect" for name in idle_scripts]
        _, idle = self._stochastic()
        sampler = self.sampler_name or self.sampler_index
        why = f"the sampler {sampler[:80]!r} has none" if sampler else "it belongs to a sampler, and none is named"
        return [*told, *(f"{name} had no effect: {why}" for name in idle)]

    def _stochastic(self) -> tuple[list[str], list[str]]:
        """Which of STOCHASTIC the sampler that is named takes, and which ask for something and have no effect."""
        from edge_sd.sampling.names import find_sampler
        from edge_sd.sampling.samplers import SAMPLERS

        sampler = self.sampler_name or self.sampler_index
        takes = SAMPLERS[find_sampler(sampler)[0]].takes if sampler else ()
        asked = [name for name, nothing in STOCHASTIC.items() if getattr(self, name) not in nothing]
        return [name for name in asked if name in takes], [name for name in asked if name not in takes]

    def _other(self, name: str) -> Any:
        return getattr(self, name, None) if name in type(self).model_fields else (self.model_extra or {}).get(name)

    def _pictures(self) -> dict[str, Any]:
        return {}

    def _scripts(self) -> dict[str, list[Any]]:
        """Name -> arguments of the scripts. Raises InvalidRequest for arguments of another form."""
        found = {}
        for name, script in (self.alwayson_scripts or {}).items():
            args = script.get("args", []) if isinstance(script, dict) else script
            if not isinstance(args, list):
                raise InvalidRequest(f"the arguments of the script {name[:80]!r} are not a list")
            found[name] = args
        return found

    def _control(self) -> dict[str, Any]:
        """The one unit of the ControlNet script; any other script that does something is refused."""
        found: dict[str, Any] = {}
        for name, args in self._scripts().items():
            if name.lower() != "controlnet":
                if any(args[:1]):
                    raise InvalidRequest(f"the script {name[:80]!r} is not offered by this server; valid: controlnet")
                continue
            units = [unit for unit in args if isinstance(unit, dict) and unit.get("enabled", True)]
            if len(units) > 1:
                raise InvalidRequest("several ControlNet units at a time are not offered by this server; give one")
            for unit in units:
                found = _unit(unit)
        return found


class TextToImage(Body):
    """The body of POST /sdapi/v1/txt2img."""

    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = None


class ImageToImage(Body):
    """The body of POST /sdapi/v1/img2img."""

    init_images: Annotated[list[Base64], Field(min_length=1, max_length=1)]
    denoising_strength: Annotated[float, Field(ge=0, le=1)] | None = 0.75
    mask: Base64 | None = None
    mask_blur: Annotated[float, Field(ge=0, le=64)] | None = None
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] | None = None
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=4096)] | None = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] | None = 0
    resize_mode: Annotated[int, Field(ge=0, le=3)] | None = 0
    include_init_images: bool | None = False

    def notes(self) -> list[str]:
        told = super().notes()
        if self.mask is not None and self.inpainting_fill not in (None, 1):
            told.append("inpainting_fill had no effect: what is under the mask is begun from")
        return told

    def _pictures(self) -> dict[str, Any]:
        from PIL import ImageOps

        image = self._sized(open_given(decode_base64(self.init_images[0], "init image"), "init image"))
        given: dict[str, Any] = {"image": png_base64(image), "strength": self.denoising_strength}
        if self.mask is not None:
            mask = self._sized(open_given(decode_base64(self.mask, "mask"), "mask").convert("L"))
            given["mask"] = png_base64(ImageOps.invert(mask) if self.inpainting_mask_invert else mask)
            given["mask_blur"] = self.mask_blur
            if self.inpaint_full_res:
                given["mask_padding"] = self.inpaint_full_res_padding or 0
        return given

    def _sized(self, image: Image) -> Image:
        """The image as large as the result: stretched, or cropped."""
        from PIL import Image as Images
        from PIL import ImageOps

        size = (self.width or image.width, self.height or image.height)
        if image.size == size or self.width is None or self.height is None:
            return image
        if self.resize_mode in (0, None):
            return image.resize(size, Images.Resampling.LANCZOS)
        if self.resize_mode == 1:
            return ImageOps.fit(image, size, Images.Resampling.LANCZOS)
        raise InvalidRequest(f"resize_mode {self.resize_mode} is not offered by this server; valid: 0, 1")


def _given(seed: int | None) -> int | None:
    """A seed; -1 stands for any."""
    return None if seed in (None, -1) else seed


def _count(body: Body) -> int:
    count = (body.batch_size or 1) * (body.n_iter or 1)
    if count > MAX_COUNT:
        raise InvalidRequest(f"batch_size times n_iter is {count}; at most {MAX_COUNT} pictures are drawn at a time")
    return count


def _unit(unit: dict[str, Any]) -> dict[str, Any]:
    """A unit of the ControlNet script as fields of a wish. Raises InvalidRequest."""
    picture = unit.get("image") or unit.get("input_image")
    if isinstance(picture, dict):
        picture = picture.get("image")
    if not isinstance(picture, str):
        raise InvalidRequest("the ControlNet unit has no image")
    module = str(unit.get("module") or "none").lower()
    reading = next((value for key, value in READINGS.items() if module.startswith(key)), None)
    if reading is None:
        raise InvalidRequest(f"the ControlNet module {module[:80]!r} is not offered; valid: {', '.join(READINGS)}")
    model = str(unit.get("model") or "None")
    if model not in ("None", CONTROLNET):
        raise InvalidRequest(f"no ControlNet {model[:80]!r}; valid: {CONTROLNET}")
    image = open_given(decode_base64(picture, "ControlNet image"), "ControlNet image")
    given: dict[str, Any] = {"control": png_base64(image), "control_reading": reading}
    for theirs, ours, high in (("weight", "control_weight", 2), ("guidance_start", "control_start", 1),
                               ("guidance_end", "control_end", 1)):  # fmt: skip
        value = unit.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
            raise InvalidRequest(f"the ControlNet unit's {theirs} is not a number from 0 to {high}")
        given[ours] = float(value)
    return given
