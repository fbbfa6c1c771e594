"""Texts that say nearly the same: all pairs whose sets of words overlap enough, none missed.

An exact similarity join with prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007,
"Scaling up all pairs similarity search"): two sets that share a share t of their words share one
of their rarest few, so only texts with such a word in common are ever compared. Unlike MinHash
it finds the same pairs everywhere and always, which a split must.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

THRESHOLD = 0.8
"""Jaccard similarity, |A∩B| / |A∪B|, from which two prompts are near-duplicates."""


def similar_pairs(
    sets: Sequence[AbstractSet[str]],
    threshold: float = THRESHOLD,
    together: Sequence[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Positions of all pairs of sets whose Jaccard similarity is at least ``threshold``.

    Empty sets have no partner.

    Args:
        sets: words of each text.
        threshold: above 0, at most 1.
        together: a label for each set, which the caller may change while pairs are yielded: two
            sets of one label are not compared any more. (Thousands of texts out of one template
            are millions of pairs, of which a few tie them all.)
    """
    often = Counter(word for words in sets for word in words)
    with_word: dict[str, list[int]] = defaultdict(list)
    label = range(len(sets)) if together is None else together
    # Shorter texts first: a partner that is looked up is never longer.
    for index in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        words = sets[index]
        rarest_first = sorted(words, key=lambda word: (often[word], word))
        # The overlap of a pair is at least threshold × the larger set: of the larger set's words
        # at most size - overlap are missing from the other, so one of the next is shared.
        looked_up = rarest_first[: _prefix(len(words), threshold)]
        compared: set[int] = set()
        for word in looked_up:
            for other in with_word[word]:
                if label[other] == label[index] or other in compared:
                    continue
                compared.add(other)
                shared = len(words & sets[other])
                if shared >= threshold * (len(words) + len(sets[other]) - shared) - 1e-9:
                    yield other, index
        # Whoever looks this one up is no shorter: the overlap is then a larger share of it.
        for word in rarest_first[: _prefix(len(words), 2 * threshold / (1 + threshold))]:
            with_word[word].append(index)


def _prefix(size: int, share: float) -> int:
    """How many of the rarest words hold one of any ``share`` of all."""
    return size - math.ceil(share * size - 1e-9) + 1


LEAST_SHARED, SHARED_BY = 10, 0.1
"""Texts that are alike in so many rows, and in more than this share of all, are of one template:
as one group they would be more than a test set, and no question is asked that often."""


def is_template(texts: int, of: int) -> bool:
    """Whether so many texts that are alike come of one template, among all of them."""
    return texts >= LEAST_SHARED and texts > SHARED_BY * of


@dataclass(frozen=True, slots=True)
class Template:
    """Texts that are alike because most of their words are one template's.

    Attributes:
        texts: their positions.
        words: that most of them share; they were not counted.
    """

    texts: tuple[int, ...]
    words: frozenset[str]


def similar_groups(
    sets: Sequence[AbstractSet[str]], threshold: float = THRESHOLD, of: int | None = None
) -> tuple[list[list[int]], list[Template]]:
    """Positions of the sets, tied through similar pairs, and the templates found on the way.

    Where so many are alike that they come of one template (`is_template`), the words that most
    of them share tell nothing apart: those are compared once more without them. Equal sets are
    always together. Groups are in order of their first position.

    Args:
        sets: words of each text.
        threshold: above 0, at most 1.
        of: how many texts there are in all; None: as many as sets.
    """
    total = len(sets) if of is None else of
    equal: dict[frozenset[str], list[int]] = defaultdict(list)
    for position, words in enumerate(sets):
        # (Empty sets say nothing: they are not alike.)
        equal[frozenset(words) or frozenset({f"\0{position}"})].append(position)
    texts = list(equal)
    found: list[list[int]] = []
    templates: list[Template] = []
    waiting = [(list(range(len(texts))), texts)]
    while waiting:
        members, words_of = waiting.pop()
        for chosen in _tied(words_of, threshold):
            group = [members[i] for i in chosen]
            often = Counter(word for i in chosen for word in words_of[i])
            common = frozenset(w for w, many in often.items() if many > len(chosen) / 2)
            if common and is_template(len(chosen), total):
                positions = sorted(p for i in group for p in equal[texts[i]])
                templates.append(Template(tuple(positions), common))
                waiting.append((group, [words_of[i] - common for i in chosen]))
            else:
                found.append(sorted(p for i in group for p in equal[texts[i]]))
    return sorted(found), templates


def _tied(sets: Sequence[AbstractSet[str]], threshold: float) -> list[list[int]]:
    label = list(range(len(sets)))
    members = [[i] for i in label]
    for pair in similar_pairs(sets, threshold, label):
        # The smaller group takes the larger one's label: each text changes few times.
        few, many = sorted((label[i] for i in pair), key=lambda at: len(members[at]))
        for i in members[few]:
            label[i] = many
        members[many] += members[few]
        members[few] = []
    return [group for group in members if group]
