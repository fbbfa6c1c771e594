"""Detect repeated facts, so that no fact is in both the training and the test set."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

SIMILARITY = 0.7
"""Jaccard similarity of word pairs from which two facts are duplicates."""


def _word_pairs(fact: str) -> frozenset[tuple[str, str]]:
    words = fact.split()
    return frozenset(zip(["", *words], [*words, ""], strict=True))


def repeated_facts(facts: Sequence[str]) -> dict[int, int]:
    """Map the index of each fact that repeats an earlier one to the index of the earlier one.

    Facts are duplicates if their sets of adjacent words have a Jaccard similarity of at least
    `SIMILARITY`. The search is exact: candidates come from the prefix filter of Chaudhuri et al.
    2006 (similar sets share one of their rarest elements).
    """
    sets = [_word_pairs(fact) for fact in facts]
    frequency = Counter(element for elements in sets for element in elements)
    by_rare_element: dict[tuple[str, str], list[int]] = defaultdict(list)
    first_with: dict[str, int] = {}
    repeats: dict[int, int] = {}
    for index, elements in enumerate(sets):
        fact = facts[index]
        if fact in first_with:
            repeats[index] = first_with[fact]
            continue
        first_with[fact] = index
        ordered = sorted(elements, key=lambda element: (frequency[element], element))
        prefix = ordered[: len(ordered) - -int(-SIMILARITY * len(ordered) // 1) + 1]
        candidates = {other for element in prefix for other in by_rare_element[element]}
        for other in sorted(candidates):
            shorter, longer = sorted((len(elements), len(sets[other])))
            if shorter < SIMILARITY * longer:
                continue
            shared = len(elements & sets[other])
            if shared >= SIMILARITY * (len(elements) + len(sets[other]) - shared):
                repeats[index] = other
                break
        else:
            for element in prefix:
                by_rare_element[element].append(index)
    return repeats


def merge_linked(names: Sequence[str], links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Map each name to the first of its connected component, in the order of `names`."""
    order = {name: index for index, name in enumerate(names)}
    parent = {name: name for name in names}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for left, right in links:
        early, late = sorted((root(left), root(right)), key=order.__getitem__)
        parent[late] = early
    return {name: root(name) for name in names}
