"""An answer before its question is phrased, and what the question forms share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

from slm_lora.ml_qa.objects import DocumentedObject


class Draft(NamedTuple):
    """An answer, and what its question asks about.

    ``category`` is the question form. ``phrasing`` is the set of wordings to choose from, where
    a form has several (an option is asked about in other words than an input). ``part`` is the
    parameter, attribute, exception or task in the question. ``fact`` is what the answer says,
    in lower-case words and without the object's name: equal facts are the same knowledge.
    """

    category: str
    response: str
    fact: str
    part: str = ""
    phrasing: str = ""


def plain_words(text: str) -> str:
    """The words of a text in lower case, without marks."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def fact_of(entry: DocumentedObject, text: str) -> str:
    """The words of a text, the names of the object masked."""
    masked = f" {plain_words(text)} "
    for name in (entry.name, entry.short_name, entry.short_name.rsplit(".", 1)[-1]):
        masked = masked.replace(f" {plain_words(name)} ", " _ ")
    return masked.strip()


def word_count(fact: str) -> int:
    """Number of words in a fact."""
    return len(fact.split())


def join_list(items: Sequence[str], conjunction: str = "and") -> str:
    """The items as in "a", "a and b" or "a, b and c"."""
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {conjunction} {items[-1]}"


def documented_names(entry: DocumentedObject) -> set[str]:
    """Names of the parameters that the docstring describes."""
    return {
        name.strip(" *")
        for parameter in entry.doc["Parameters"]
        for name in parameter.name.split(",")
    }


def arguments_of(entry: DocumentedObject) -> tuple[list[str], list[str]] | None:
    """Required and optional arguments, written as code, or None if they are not surely known."""
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
    # Compiled functions may show invented names (x1, x2) that their documentation does not use.
    if not set(required) <= documented_names(entry):
        return None
    return [f"`{name}`" for name in required], [f"`{name}`" for name in optional]
