"""Wording: the text side of a pipeline, from a request's prompts to what its text encoder takes.

It holds what is read once: the tokenizer, words of one's own, LoRAs. Settings name the files by their hashes. A file is
read again when its size or its time has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..bundle.bundle import ModelBundle
from ..bundle.facts import TextPart
from ..components.edits import NONE, Edits
from ..components.lora import Lora, Unplaced, find_loras, read_lora
from ..components.lora_strength import CONFIG_FILE
from ..files import Files
from ..text.conditioning import HIDDEN, states_of
from ..text.known_words import KnownWords
from ..text.prompt import LoraWeight, take_loras
from ..text.prompt import notes as other_languages
from ..text.schedule import AND, Script, script
from ..text.textual_inversion import Embedding, check_word, ids_of, read_embedding
from ..text.tokenizer import Chunk
from ..text.whole import PromptTokenizer, open_tokenizer
from .request import Request
from .settings import Settings


@dataclass
class Wording:
    """Prompts of one model."""

    bundle: ModelBundle
    _tokenizers: dict[str, PromptTokenizer] = field(default_factory=dict)
    _embeddings: dict[str, Embedding] = field(default_factory=dict)
    _loras: dict[str, Lora] = field(default_factory=dict)
    _lora_files: Files[Lora] = field(default_factory=lambda: Files(read_lora, (CONFIG_FILE,)))
    _embedding_files: Files[Embedding] = field(default_factory=lambda: Files(_read_vectors))
    _unplaced: Unplaced = field(default_factory=Unplaced)
    _known: list[KnownWords | None] = field(default_factory=list)

    def tokenizer(self, text: TextPart | None = None) -> PromptTokenizer:
        """The tokenizer of a text encoder, the first by default, read at first use."""
        facts = self.bundle.facts
        text = text or facts.encoders[0]
        if text.tokenizer not in self._tokenizers:
            self._tokenizers[text.tokenizer] = open_tokenizer(self.bundle.path(text.tokenizer), text, facts)
        return self._tokenizers[text.tokenizer]

    def read(self, request: Request) -> dict[str, str]:
        """Read the files of `request.embeddings`: word -> the file's hash. Raises InvalidRequest or InvalidModel."""
        digests, facts = {}, self.bundle.facts
        for word, path in request.embeddings.items():
            embedding = replace(self._embedding_files.read(Path(path)), word=check_word(word))
            embedding.check([text.part for text in facts.encoders if text.kind == "clip"], facts.word_width)
            digests[word] = embedding.sha256
            self._embeddings[embedding.sha256] = embedding
        return digests

    def read_loras(self, request: Request) -> dict[str, tuple[float, float, str]]:
        """Read the files of `request.loras` and those that its prompt names.

        Name -> weight for the text encoders, weight for the UNet, the file's hash.
        """
        named = take_loras(request.prompt)[1]
        given = {path: LoraWeight(weight, weight) for path, weight in request.loras.items()}
        folder = None if request.lora_folder is None else Path(request.lora_folder)
        used = {}
        for path, weight in find_loras(given, named, folder).items():
            lora = self._lora_files.read(path)
            lora.check(self.bundle.facts.text_width, self.bundle.facts.denoiser)
            used[lora.name] = (float(weight.text), float(weight.unet), lora.sha256)
            self._loras[lora.sha256] = lora
        return used

    def script(self, settings: Settings, prompt: str | None = None) -> Script:
        """Which texts are encoded for which steps: the negative prompt, where it takes part, then the prompt's parts.

        `prompt` replaces the settings' own.
        """
        made = script(settings.prompt if prompt is None else prompt, settings.negative, max(1, settings.steps_taken))
        if settings.guided and not self.bundle.facts.takes_guidance:
            return made
        return replace(made, stages=tuple(replace(stage, texts=stage.texts[1:]) for stage in made.stages))

    def count(self, settings: Settings, variant: str) -> int:
        """Number of chunks: that of the longest prompt; 1 for a UNet of fixed shape, and where prompts are whole."""
        if self.bundle.variant(variant).static or not self.bundle.facts.chunked:
            return 1
        texts = self.script(settings).texts
        if settings.toward is not None:
            texts += self.script(settings, settings.toward).texts
        words = ids_of(self._words(settings))
        return max(len(self.tokenizer().chunks(text, words)) for text in texts)

    def chunks(self, settings: Settings, texts: Sequence[str], count: int, text: TextPart) -> list[list[Chunk]]:
        """`count` chunks of each of `texts`, for one of the text encoders."""
        words, tokenizer = ids_of(self._words(settings)), self.tokenizer(text)
        # Only CLIP takes a prompt in pieces.
        count = count if text.kind == "clip" else 1
        # Where there is a negative prompt, it is the first.
        signs = [settings.guided and not self.bundle.facts.takes_guidance, *[False] * (len(texts) - 1)]
        return [
            tokenizer.filled(tokenizer.chunks(each, words, negative), count)[:count]
            for each, negative in zip(texts, signs, strict=True)
        ]

    def edits(self, settings: Settings) -> dict[str, Edits]:
        """Edits of each component that `settings` ask for: CLIP skip, textual inversions and LoRAs."""
        words = self._words(settings).values()
        key = " ".join(word.sha256 for word in words)
        made = {self.bundle.facts.denoiser: NONE, "controlled_unet": NONE}
        for text in self.bundle.facts.encoders:
            if text.kind != "clip":
                made[text.part] = Edits()
                continue
            vectors = [each for word in words if (each := word.for_part(text.part)) is not None]
            # Where another output is attended to, that is what skips layers (conditioning.states_of).
            skip = 1 if text.states.startswith(HIDDEN) else settings.clip_skip
            states = states_of(text, settings.clip_skip)
            states = "" if states == text.states else states
            made[text.part] = Edits(key, skip, np.concatenate(vectors) if vectors else None, states=states)
        for part, edits in made.items():
            textual = part.startswith("text")
            weights = ((digest, text if textual else unet) for text, unet, digest in settings.loras.values())
            loras = ((self._loras[digest], weight) for digest, weight in weights if weight)
            if mine := tuple((lora, weight) for lora, weight in loras if lora.has(part)):
                made[part] = replace(edits, loras=mine, part=part, unplaced=self._unplaced)
        return made

    def notes(self, settings: Settings, variant: str) -> list[str]:
        """Notes about words and LoRAs of the prompts that had no effect."""
        notes = []
        tokenizer, count = self.tokenizer(), self.count(settings, variant)
        words = ids_of(self._words(settings))
        unused = dict(words)
        made = script(settings.prompt, settings.negative, max(1, settings.steps_taken))
        prompts = [text for stage in made.stages for text in stage.texts[1:]]
        negatives = [stage.texts[0] for stage in made.stages]
        for name, texts in (("prompt", prompts), ("negative prompt", negatives)):
            for text in dict.fromkeys(texts):
                chunks = tokenizer.chunks(text, words)
                used_ids = {int(id_) for chunk in chunks[:count] for id_ in chunk.ids}
                unused = {word: ids for word, ids in unused.items() if ids[0] not in used_ids}
                left = chunks[count:] if self.bundle.facts.chunked else []
                if left:
                    room = self.bundle.facts.max_tokens - 2
                    notes.append(
                        f"the {name} is longer than the {room} tokens that {variant} takes; "
                        f"not used: {tokenizer.words(left)!r}"
                    )
                notes += self._cut(name, text)
        notes += [note for text in (settings.prompt, settings.negative) for note in other_languages(text)]
        notes += made.notes()
        if settings.clip_skip > 1 and not self.bundle.facts.chunked:
            notes.append(f"{self.bundle.name} has no CLIP: clip_skip {settings.clip_skip} skips nothing")
        if settings.negative and self.bundle.facts.takes_guidance:
            notes.append(f"{self.bundle.name} takes the guidance scale itself: the negative prompt is not used")
        if AND.search(settings.negative):
            notes.append("AND is a word in the negative prompt; it composes parts of the prompt alone")
        notes += self._unknown(prompts, words)
        notes += [f"the embedding {word!r} is in no prompt" for word in unused]
        parts = self.bundle.variant(variant).artifacts
        loras = [self._loras[str(digest)] for *_, digest in settings.loras.values()]
        return notes + [note for lora in loras for note in lora.notes(parts, self._unplaced.of(lora))]

    def _cut(self, name: str, prompt: str) -> Iterator[str]:
        """A note for each encoder that takes prompts whole, and has no room for the end of this one."""
        for text in (each for each in self.bundle.facts.encoders if each.kind != "clip"):
            tokenizer = self.tokenizer(text)
            if left := tokenizer.chunks(prompt, negative=name.startswith("negative"))[1:]:
                what = f"{text.part} takes {text.rows or text.tokens} tokens of the {name}"
                yield f"{what}; it does not read: {tokenizer.words(left)!r}"

    def _unknown(self, prompts: Sequence[str], own: Iterable[str]) -> list[str]:
        """A note on the words that a small model was not taught; words of the request's own files are no part of it."""
        if not self._known:
            self._known.append(KnownWords.read(self.bundle.root))
        known = self._known[0]
        text = ". ".join(dict.fromkeys(prompts))
        for word in own:
            text = text.replace(word, ".")
        note = known.note(self.bundle.name, text) if known is not None else ""
        return [note] if note else []

    def _words(self, settings: Settings) -> dict[str, Embedding]:
        return {word: self._embeddings[digest] for word, digest in settings.embeddings.items()}


def _read_vectors(path: Path) -> Embedding:
    """An embedding whose word is still to be set: the request's, which may not be the file's."""
    return read_embedding(path, "word")
