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

THRESHOLD = 0.8
"""Jaccard similarity, |A∩B| / |A∪B|, from which two prompts are near-duplicates."""


def similar_pairs(
    sets: Sequence[AbstractSet[str]], threshold: float = THRESHOLD
) -> Iterator[tuple[int, int]]:
    """Positions of all pairs of sets whose Jaccard similarity is at least ``threshold``.

    Empty sets have no partner.

    Args:
        sets: words of each text.
        threshold: above 0, at most 1.
    """
    often = Counter(word for words in sets for word in words)
    with_word: dict[str, list[int]] = defaultdict(list)
    # Shorter texts first: a partner that is looked up is never longer.
    for index in sorted(range(len(sets)), key=lambda i: (len(sets[i]), i)):
        words = sets[index]
        rarest_first = sorted(words, key=lambda word: (often[word], word))
        # The overlap of a pair is at least threshold × the larger set: of the larger set's words
        # at most size - overlap are missing from the other, so one of the next is shared.
        prefix = rarest_first[: len(words) - math.ceil(threshold * len(words) - 1e-9) + 1]
        candidates = {other for word in prefix for other in with_word[word]}
        for other in sorted(candidates):
            shared = len(words & sets[other])
            if shared >= threshold * (len(words) + len(sets[other]) - shared) - 1e-9:
                yield other, index
        for word in prefix:
            with_word[word].append(index)
