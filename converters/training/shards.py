"""Captioned pictures from webdataset shards: tar files of NAME.png (or .jpg, .webp) beside NAME.txt.

What a training learns from is anything with `batch`; this is the one for collections that fit in no memory. Shards are
read in turn for ever, split between the processes of `accelerate launch`, and shuffled in a buffer. Pictures are
cropped to a square and shrunk to the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from edge_sd.errors import InvalidRequest, MissingExtra

from .data import SIZE

BUFFER = 1000
PICTURES = "png;jpg;jpeg;webp"


def pictures(pattern: str, seed: int) -> Iterator[tuple[NDArray[np.float32], str]]:
    """Pictures float32 [3, 128, 128] in [-1, 1] and their captions, for ever.

    `pattern`: a path, with ranges in braces: "folder/emoji-{0000..0063}.tar". Raises InvalidRequest where a shard
    cannot be read or holds no pictures with captions.
    """
    try:
        import webdataset
    except ImportError as error:
        raise MissingExtra("training from webdataset shards", "train") from error
    stream = webdataset.WebDataset(
        pattern, shardshuffle=100, seed=seed, nodesplitter=webdataset.split_by_node, empty_check=False
    )
    stream = stream.shuffle(BUFFER).decode("pil").to_tuple(PICTURES, "txt")
    while True:
        count = 0
        try:
            for image, caption in stream:
                count += 1
                yield _as_array(image), caption.strip()
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"the shards {pattern} cannot be read: {error}") from error
        if not count:
            raise InvalidRequest(f"the shards {pattern} hold no pictures ({PICTURES}) with captions (.txt)")


def _as_array(image: Image.Image) -> NDArray[np.float32]:
    square = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE))
    picture: NDArray[np.float32] = np.asarray(square, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return picture


class ShardLatents:
    """Latents of pictures from shards, encoded as they come; one caption in ten is emptied, as guidance needs."""

    def __init__(self, pattern: str, vae: Any, device: str, seed: int) -> None:
        self._pictures = pictures(pattern, seed)
        self._vae, self._device = vae, device

    def batch(self, size: int, rng: np.random.Generator) -> tuple[Tensor, list[str], NDArray[np.int64]]:
        """Latents float32 [size, 4, 16, 16], their captions, and a running number."""
        some = [next(self._pictures) for _ in range(size)]
        x = torch.from_numpy(np.stack([picture for picture, _ in some])).to(self._device)
        with torch.no_grad():
            z = self._vae.encode(x).latent_dist.mean.float().cpu() * self._vae.config.scaling_factor
        captions = ["" if rng.random() < 0.1 else caption for _, caption in some]
        return z, captions, np.arange(size)
