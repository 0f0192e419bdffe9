"""The text side: a byte-pair tokenizer in CLIP's format and a small CLIP text model, trained together with the UNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_sd.errors import InvalidRequest

from .data import Artwork

MAX_LENGTH = 32
VOCABULARY = 4096
START, END = "<|startoftext|>", "<|endoftext|>"
CONFIG: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 768,
    "projection_dim": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_act": "quick_gelu",
}


def train_tokenizer(work: Path) -> Path:
    """Learn the merges from captions and from the names and keywords of all emoji; writes `work`/tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    artwork = Artwork(work)
    rng = np.random.default_rng(0)
    lines = [artwork.caption(c, s, "white", rng) for _ in range(4) for c, s in artwork.pairs()]
    lines += artwork.words

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        [line.lower() for line in lines],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 2 - len(alphabet),
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    # CLIP's order of ids: bytes, bytes at a word's end, merges, then the two special tokens.
    merges = [tuple(merge) for merge in learned["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    folder = work / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=END,
        model_max_length=MAX_LENGTH,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def load_tokenizer(work: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def build(work: Path, tokenizer: Any) -> Any:
    """The text model of `work`/text_encoder to go on from, or a new one."""
    from transformers import CLIPTextConfig, CLIPTextModel

    if (work / "text_encoder/config.json").is_file():
        return CLIPTextModel.from_pretrained(work / "text_encoder")
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextModel(CLIPTextConfig(**CONFIG, vocab_size=len(tokenizer), **ids))


def is_wide(work: Path) -> bool:
    """Whether the text encoder of `work` has been taught words that no caption holds (`widen`)."""
    return (work / "text_encoder_wide/config.json").is_file()


def load_final(work: Path) -> Any:
    """The text encoder with its wider vocabulary, if it was taught one (`widen`). Raises InvalidRequest."""
    from transformers import CLIPTextModel

    for folder in ("text_encoder_wide", "text_encoder"):
        if (work / folder / "config.json").is_file():
            return CLIPTextModel.from_pretrained(work / folder)
    raise InvalidRequest(f"{work} holds no text encoder; train it first: edge-sd train unet --work {work}")


def tokenize(tokenizer: Any, captions: list[str]) -> Any:
    """int64 [B, 32], padded with the end token as Stable Diffusion's pipelines do."""
    padded = tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
    return padded.input_ids


def length(ids: Any) -> int:
    """How many of a caption's int64 [32] tokens come before the padding: up to its end token, that one included."""
    return int((ids == ids[-1]).int().argmax()) + 1 if bool((ids == ids[-1]).any()) else len(ids)
