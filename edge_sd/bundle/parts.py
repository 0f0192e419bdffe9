"""The names of components, as manifests and the pipeline know them."""

from __future__ import annotations

# Decodes at a fraction of the work (AutoencoderTiny), where a model has one.
TINY = "tiny_decoder"
# Makes finished pictures larger (ESRGAN's class), where a model was given one.
UPSCALER = "upscaler"
# The inputs of components that are as large as a picture or its latents.
PICTURES = ("sample", "latent_sample", "image")
# What an encoder without a distribution returns, in the words of optimum-intel's exports.
LATENTS = "latent_sample"
# Looks at finished pictures, in models that come with one.
SAFETY_CHECKER = "safety_checker"
# Looks at the pictures that a UNet with an IP-Adapter attends to.
IMAGE_ENCODER = "image_encoder"
# A ControlNet; others of the same variant are called controlnet_NAME.
NET = "controlnet"
# The component that denoises, by the kinds that there are; a model has one.
DENOISERS = ("unet", "transformer")
# In the order of the pipeline.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# Request.decoder -> the component.
DECODER = {"full": "vae_decoder", "tiny": TINY}
# Component -> the component whose device it shares.
HOMES = {
    "vae_encoder": "vae_decoder", TINY: "vae_decoder", UPSCALER: "vae_decoder", "controlled_unet": "unet",
    "text_encoder_2": "text_encoder", "text_encoder_3": "text_encoder", SAFETY_CHECKER: "text_encoder",
    IMAGE_ENCODER: "text_encoder",
}  # fmt: skip


def kind_of(part: str) -> str:
    """What a component is, whichever of several ControlNets."""
    return NET if part.startswith(f"{NET}_") else part


def home_of(part: str) -> str:
    """The component that decides where `part` is."""
    return "unet" if part.startswith(NET) else HOMES.get(part, part)
