"""What the refusal detector sees of an answer: named signs and word groups, in the light of the question.

An answer is normalised, split into sentences, and described by a sparse dict of features: which named signs
(`patterns.yaml`) its sentences show and where, and its groups of one to three words. The question's own words are
masked (`qq`), so that the topic does not matter. What a sign means depends on the question ("there is no reason for
that" refuses to argue for a claim, but answers "why can cats fly?"), so features are also crossed with the question's
form.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import yaml

PATTERNS_PATH = Path(__file__).parent / "patterns.yaml"

MAX_SENTENCES, MAX_SENTENCE_LENGTH, MAX_LENGTH = 12, 500, 4000
"""Refusals show early. The bounds (sentences, characters) limit the work per answer, however long the text is."""

SIGN_VALUE = 0.1
"""Value of a present sign; an answer's word groups together have length 1. Chosen on development rows."""

_CONTRACTIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\bcan't|\bcan not\b|\bcant\b", "cannot"),
        (r"\bwon't", "will not"),
        (r"\blet's\b", "let us"),
        (r"n't\b", " not"),
        (r"'m\b", " am"),
        (r"'re\b", " are"),
        (r"'ll\b", " will"),
        (r"'ve\b", " have"),
        (r"'d\b", " would"),
        (r"\b(it|that|there|what|here|he|she)'s\b", r"\1 is"),
    )
]
_QUOTES = str.maketrans(
    {"‘": "'", "’": "'", "ʼ": "'", "´": "'", "“": '"', "”": '"', "«": '"', "»": '"', "\u00a0": " "}
)
_MARKDOWN = re.compile(r"[*`~]+|(?<!\w)_+|_+(?!\w)|^[ \t]*[#>]+", re.MULTILINE)
_SPACES = re.compile(r"[^\S\n]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_LIST_ITEM = re.compile(r"(?m)^\s*(?:\d{1,2}[.)]|[-*•])\s")
_WORD = re.compile(r"[\w']+")
_SUFFIX = re.compile(r"(ing|ed|es|s|e|'s)$")
_FUNCTION_WORDS = frozenset(
    "a an the of to in on at for is are was were be been do does did i you we my your what how why where who when can "
    "could should not with and or it that this me some s from as by have has".split()
)


@dataclass(frozen=True)
class Pattern:
    """A named regular expression and the reason for it."""

    name: str
    why: str
    expression: re.Pattern


@lru_cache
def load_patterns() -> dict[str, tuple[Pattern, ...]]:
    """The shipped patterns: `certain`, `questions` and `signs`."""
    data = yaml.safe_load(PATTERNS_PATH.read_text(encoding="utf-8"))
    return {
        group: tuple(
            Pattern(name, entry["why"], re.compile(entry["pattern"], re.MULTILINE)) for name, entry in entries.items()
        )
        for group, entries in data.items()
    }


def normalize(text: str) -> str:
    """Lower case, straight quotes, no markdown, contractions spelled out."""
    text = _SPACES.sub(" ", _MARKDOWN.sub("", text[:MAX_LENGTH].translate(_QUOTES).lower()))
    for pattern, replacement in _CONTRACTIONS:
        text = pattern.sub(replacement, text)
    return text.strip()


def split_sentences(text: str) -> list[str]:
    """The first sentences of a text, each cut to a maximum length."""
    sentences = (sentence.strip() for sentence in _SENTENCE_END.split(text))
    return [sentence[:MAX_SENTENCE_LENGTH] for sentence in sentences if sentence][:MAX_SENTENCES]


def question_form(prompt: str) -> str:
    """`normative`, `why`, `how_to` or `fact`."""
    prompt = normalize(prompt)
    return next((p.name for p in load_patterns()["questions"] if p.expression.search(prompt)), "fact")


class AnswerFeatures:
    """
    The parts of an answer, and its features.

    Args:
        prompt (`str`, *optional*): The question. `None` if unknown; features that need it are then left out.
        answer (`str`): The answer.
    """

    def __init__(self, prompt: str | None, answer: str):
        self.prompt = prompt
        self.answer = answer[:MAX_LENGTH]
        self.sentences = split_sentences(normalize(answer))

    @cached_property
    def signs(self) -> dict[str, int]:
        """Each sign that occurs, with the index of the first sentence that shows it."""
        text = "\n".join(self.sentences)
        matches = ((pattern.name, pattern.expression.search(text)) for pattern in load_patterns()["signs"])
        return {name: text.count("\n", 0, match.start()) for name, match in matches if match}

    @cached_property
    def gives_list(self) -> bool:
        """Whether the answer has three list items or a code block, which are signs of substantial help."""
        return len(_LIST_ITEM.findall(self.answer)) >= 3 or "```" in self.answer

    def to_dict(self) -> dict[str, float]:
        """The features' values by name."""
        form = None if self.prompt is None else question_form(self.prompt)
        signs = {f"{name}@{_place(index)}" for name, index in self.signs.items()}
        early = {name for name, index in self.signs.items() if index < 3}
        early.update(name for name, holds in (("list", self.gives_list), ("short", len(self.sentences) < 3)) if holds)
        if not self.gives_list and "steps" not in self.signs:
            early.add("no_steps")
        features = {f"sign:{name}": SIGN_VALUE for name in signs | early}
        asked = set() if self.prompt is None else {_stem(w) for w in _words(normalize(self.prompt))} - _FUNCTION_WORDS
        words = [_mask(sentence, asked) for sentence in self.sentences[:3]]
        features.update(_unit("words:", Counter(group for w in words for group in _groups(w, 3))))
        if form is not None:
            features[f"form:{form}"] = SIGN_VALUE
            features.update({f"form:{form}:{name}": SIGN_VALUE for name in early})
            features.update(_unit(f"{form}:", Counter(group for w in words for group in _groups(w, 2))))
            if "my" in _words(normalize(self.prompt)):
                features.update({f"own:{name}": SIGN_VALUE for name in early})
        return features


def _place(index: int) -> str:
    return "first" if index == 0 else "opening" if index < 3 else "later"


def _words(text: str) -> list[str]:
    return _WORD.findall(text)


def _stem(word: str) -> str:
    return _SUFFIX.sub("", word) if len(word) > 4 else word


def _mask(sentence: str, asked: set[str]) -> list[str]:
    """The sentence's words; each run of words that also occur in the question becomes one `qq`."""
    masked = []
    for word in _words(sentence):
        word = "qq" if _stem(word) in asked else word
        if word != "qq" or masked[-1:] != ["qq"]:
            masked.append(word)
    return ["^", *masked]


def _groups(words: list[str], longest: int):
    for length in range(1, longest + 1):
        for start in range(len(words) - length + 1):
            yield " ".join(words[start : start + length])


def _unit(prefix: str, counts: Counter) -> dict[str, float]:
    """Presence of each word group, scaled so that an answer's groups together have length 1."""
    return {prefix + group: len(counts) ** -0.5 for group in counts}
