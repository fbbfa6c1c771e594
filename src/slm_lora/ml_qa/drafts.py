"""Answers before their questions are phrased, and helpers of the question forms."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

from slm_lora.ml_qa.objects import DocumentedObject


class Draft(NamedTuple):
    """An answer with the data of its question.

    Attributes:
        category: the question form.
        response: text of the answer.
        fact: content of the answer in lower-case words, object names masked; equal facts are
            duplicates.
        part: parameter, attribute, exception or task in the question.
        phrasing: key in ``PHRASINGS``; empty: the category.
    """

    category: str
    response: str
    fact: str
    part: str = ""
    phrasing: str = ""


def plain_words(text: str) -> str:
    """Return the words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def mask_names(entry: DocumentedObject, text: str) -> str:
    """Return the words of a text with the names of the object masked by ``_``."""
    masked = f" {plain_words(text)} "
    for name in (entry.name, entry.short_name, entry.short_name.rsplit(".", 1)[-1]):
        masked = masked.replace(f" {plain_words(name)} ", " _ ")
    return masked.strip()


def word_count(fact: str) -> int:
    """Return the number of words of a fact."""
    return len(fact.split())


def join_list(items: Sequence[str], conjunction: str = "and") -> str:
    """Join items as in "a", "a and b" or "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def documented_names(entry: DocumentedObject) -> set[str]:
    """Return the names of the parameters that the docstring describes."""
    return {
        name.strip(" *")
        for parameter in entry.doc["Parameters"]
        for name in parameter.name.split(",")
    }


def split_arguments(entry: DocumentedObject) -> tuple[list[str], list[str]] | None:
    """Return required and optional arguments in backticks, or None if they are uncertain."""
    if entry.signature is None:
        return None
    required: list[str] = []
    optional: list[str] = []
    for parameter in entry.signature.parameters.values():
        if parameter.name in {"self", "cls"}:
            continue
        if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            return None
        (required if parameter.default is inspect.Parameter.empty else optional).append(
            parameter.name
        )
    # Signatures of compiled functions may have names (x1, x2) that are not in the documentation.
    if not set(required) <= documented_names(entry):
        return None
    return [f"`{name}`" for name in required], [f"`{name}`" for name in optional]
