"""The embedded data set: question-answer pairs on machine learning and scientific computing.

Built on the user's machine from the docstrings of the installed scikit-learn, SciPy and NumPy;
equal versions give equal bytes. Importing this module loads none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_lora.runtime.storage import atomic_write_text

if TYPE_CHECKING:
    from slm_lora.ml_qa.questions import Pair

CATEGORY_LIMITS: Mapping[str, int] = {
    "parameter_meaning": 1900,
    "function_purpose": 1000,
    "return_value": 900,
    "related_objects": 600,
    "method_purpose": 500,
    "attribute_meaning": 500,
    "class_purpose": 500,
    "function_for_task": 500,
    "default_value": 450,
    "usage_note": 450,
    "required_arguments": 350,
    "array_shape": 250,
    "parameter_options": 250,
    "exception_raised": 150,
}
"""Maximum number of rows of each question form, so that no form dominates."""

# Forms whose answers may state the same fact: duplicates are removed across a family.
_FAMILIES = {
    "function_purpose": "purpose",
    "method_purpose": "purpose",
    "class_purpose": "purpose",
    "parameter_meaning": "value",
    "attribute_meaning": "value",
    "return_value": "value",
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The written data set.

    Attributes:
        rows: number of rows.
        categories: number of rows of each category.
        versions: versions of the libraries.
        sha256: SHA-256 of the file.
    """

    rows: int
    categories: dict[str, int]
    versions: dict[str, str]
    sha256: str


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that the rows depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "numpydoc", "scikit-learn", "scipy")}


def build_rows() -> list[dict[str, str]]:
    """Build all rows, with the keys ``instruction``, ``response``, ``category`` and ``group``.

    Rows of one object, its methods, and objects with the same documentation share a ``group``:
    the qualified name of the first of them. No fact occurs twice. Sorted by group, category and
    instruction. Takes about 10 s on one core.

    Raises:
        UsageError: scikit-learn, SciPy or numpydoc is not installed, or Python runs with -OO.
    """
    from slm_lora.ml_qa.objects import public_objects
    from slm_lora.ml_qa.questions import make_pairs

    objects = public_objects()
    short_names = Counter(entry.short_name for entry in objects)
    pairs = [
        pair for entry in objects for pair in make_pairs(entry, short_names[entry.short_name] > 1)
    ]
    unique, group_of = _deduplicate(pairs)
    rows = [
        {
            "instruction": pair.instruction,
            "response": pair.response,
            "category": pair.category,
            "group": group_of[pair.owner],
        }
        for pair in _apply_limits(unique)
    ]
    return sorted(rows, key=lambda row: (row["group"], row["category"], row["instruction"]))


def _deduplicate(pairs: Sequence[Pair]) -> tuple[list[Pair], dict[str, str]]:
    """Keep the first pair of every fact, answer and question; return the group of every object."""
    from slm_lora.ml_qa.drafts import plain_words
    from slm_lora.ml_qa.duplicates import merge_linked, repeated_facts

    families: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        families[_FAMILIES.get(pair.category, pair.category)].append(pair)
    kept: list[Pair] = []
    prose_facts: Counter[str] = Counter()
    repeats: Counter[tuple[str, str]] = Counter()
    same_purpose: list[tuple[str, str]] = []
    for family, members in families.items():
        first_of = repeated_facts([pair.fact for pair in members])
        for index, pair in enumerate(members):
            is_prose = len(pair.fact.split()) >= 8
            prose_facts[pair.owner] += is_prose
            if index not in first_of:
                kept.append(pair)
                continue
            first = members[first_of[index]].owner
            if first != pair.owner:
                repeats[first, pair.owner] += is_prose
                if family == "purpose" and pair.category != "method_purpose":
                    same_purpose.append((first, pair.owner))
    links = [
        *same_purpose,
        # Most facts of the later object repeat the earlier one: they are one topic.
        *(
            link
            for link, count in repeats.items()
            if 2 * count >= prose_facts[link[1]] and count > 1
        ),
    ]
    owners = list(dict.fromkeys(pair.owner for pair in pairs))
    # Texts that differ in case, punctuation and spacing only are equal.
    by_answer: dict[str, Pair] = {}
    for pair in kept:
        by_answer.setdefault(plain_words(pair.response), pair)
    by_question: dict[str, Pair] = {}
    for pair in by_answer.values():
        by_question.setdefault(plain_words(pair.instruction), pair)
    return list(by_question.values()), merge_linked(owners, links)


def _apply_limits(pairs: Sequence[Pair]) -> list[Pair]:
    """Select at most `CATEGORY_LIMITS` pairs of each form, by a hash of the question."""
    by_category: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_category[pair.category].append(pair)
    chosen: list[Pair] = []
    for category, members in by_category.items():
        members.sort(key=lambda pair: hashlib.sha256(pair.instruction.encode()).digest())
        chosen.extend(members[: CATEGORY_LIMITS[category]])
    return chosen


def write_jsonl(path: Path) -> Manifest:
    """Build the rows and write them atomically, one JSON object per line, in UTF-8.

    Raises:
        UsageError: as `build_rows`.
        StorageError: the file cannot be written.
    """
    rows = build_rows()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, text)
    return Manifest(
        rows=len(rows),
        categories=dict(sorted(Counter(row["category"] for row in rows).items())),
        versions=library_versions(),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
