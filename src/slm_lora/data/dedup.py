"""Near-duplicate detection: all pairs of texts whose word sets overlap enough.

An exact similarity join with prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007,
"Scaling up all pairs similarity search"): two similar sets share one of their rarest words, so
only texts with such a word in common are compared. Unlike MinHash it misses no pair and is
deterministic, which a reproducible split requires.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

DEFAULT_THRESHOLD = 0.8
"""Jaccard similarity, |A∩B| / |A∪B|, from which two prompts are near-duplicates."""


def similar_pairs(
    sets: Sequence[AbstractSet[str]],
    threshold: float = DEFAULT_THRESHOLD,
    labels: Sequence[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield the positions of all pairs of sets with Jaccard similarity of at least ``threshold``.

    Empty sets are in no pair.

    Args:
        sets: words of each text.
        threshold: above 0, at most 1.
        labels: cluster label of each set, which the caller may update while pairs are yielded:
            sets of equal label are no longer compared. (Thousands of texts from one template
            make millions of pairs, of which few are needed to connect them.)
    """
    frequency = Counter(word for words in sets for word in words)
    index_of_word: dict[str, list[int]] = defaultdict(list)
    label = range(len(sets)) if labels is None else labels
    # Shorter texts first: an indexed partner is never longer.
    for index in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        words = sets[index]
        rarest_first = sorted(words, key=lambda word: (frequency[word], word))
        # The overlap of a pair is at least threshold × the larger set: at most size - overlap
        # of the larger set's words are not shared, so one more word must be.
        compared: set[int] = set()
        for word in rarest_first[: _prefix_length(len(words), threshold)]:
            for other in index_of_word[word]:
                if label[other] == label[index] or other in compared:
                    continue
                compared.add(other)
                shared = len(words & sets[other])
                if shared >= threshold * (len(words) + len(sets[other]) - shared) - 1e-9:
                    yield other, index
        # Later partners are no shorter: the overlap is then a larger share of this set.
        for word in rarest_first[: _prefix_length(len(words), 2 * threshold / (1 + threshold))]:
            index_of_word[word].append(index)


def _prefix_length(size: int, share: float) -> int:
    """Number of rarest words of which any subset of ``share`` of all words contains one."""
    return size - math.ceil(share * size - 1e-9) + 1


MIN_TEMPLATE_TEXTS, MIN_TEMPLATE_SHARE = 10, 0.1
"""Number and share of similar texts from which they count as filled-in forms of one template: as
one group they would exceed a test set, and no real question is repeated that often."""


def is_template(texts: int, total: int) -> bool:
    """Whether ``texts`` similar texts out of ``total`` count as one template."""
    return texts >= MIN_TEMPLATE_TEXTS and texts > MIN_TEMPLATE_SHARE * total


@dataclass(frozen=True, slots=True)
class Template:
    """Texts that are similar because most of their words come from one template.

    Attributes:
        texts: positions of the texts.
        words: words that most of the texts share, left out of the comparison.
    """

    texts: tuple[int, ...]
    words: frozenset[str]


def similar_groups(
    sets: Sequence[AbstractSet[str]], threshold: float = DEFAULT_THRESHOLD, total: int | None = None
) -> tuple[list[list[int]], list[Template]]:
    """Cluster sets into connected components of similar pairs, and detect templates.

    Where a component counts as a template (`is_template`), its sets are compared again without
    the words that most of them share. Equal sets are always in one group.

    Args:
        sets: words of each text.
        threshold: above 0, at most 1.
        total: number of texts in all; None: the number of sets.

    Returns:
        Groups of positions, ordered by their first position; the templates.
    """
    total = len(sets) if total is None else total
    equal: dict[frozenset[str], list[int]] = defaultdict(list)
    for position, words in enumerate(sets):
        # (Empty sets are not similar to each other.)
        equal[frozenset(words) or frozenset({f"\0{position}"})].append(position)
    texts = list(equal)
    groups: list[list[int]] = []
    templates: list[Template] = []
    pending = [(list(range(len(texts))), texts)]
    while pending:
        members, words_of = pending.pop()
        for component in _components(words_of, threshold):
            group = [members[i] for i in component]
            counts = Counter(word for i in component for word in words_of[i])
            common = frozenset(w for w, count in counts.items() if count > len(component) / 2)
            positions = sorted(p for i in group for p in equal[texts[i]])
            if common and is_template(len(component), total):
                templates.append(Template(tuple(positions), common))
                pending.append((group, [words_of[i] - common for i in component]))
            else:
                groups.append(positions)
    return sorted(groups), templates


def _components(sets: Sequence[AbstractSet[str]], threshold: float) -> list[list[int]]:
    """Return the connected components of similar pairs."""
    labels = list(range(len(sets)))
    members = [[i] for i in labels]
    for pair in similar_pairs(sets, threshold, labels):
        # The smaller component takes the larger one's label, so that labels change rarely.
        smaller, larger = sorted((labels[i] for i in pair), key=lambda label: len(members[label]))
        for i in members[smaller]:
            labels[i] = larger
        members[larger] += members[smaller]
        members[smaller] = []
    return [group for group in members if group]
