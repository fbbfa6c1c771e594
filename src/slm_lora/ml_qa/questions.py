"""Make the question-answer pairs of a documented object."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from slm_lora.ml_qa.behaviour import (
    argument_drafts,
    exception_drafts,
    note_drafts,
    purpose_drafts,
    related_drafts,
    result_drafts,
)
from slm_lora.ml_qa.cleaning import is_self_contained
from slm_lora.ml_qa.objects import DocumentedObject
from slm_lora.ml_qa.values import attribute_drafts, parameter_drafts, shape_drafts

MIN_CHARACTERS = 20
MAX_CHARACTERS = 600


class Pair(NamedTuple):
    """A question with its answer.

    Attributes:
        instruction: the question.
        response: the answer.
        category: the question form.
        owner: the object, or the class of a method.
        fact: content of the answer, object names masked; pairs of equal facts are duplicates.
    """

    instruction: str
    response: str
    category: str
    owner: str
    fact: str


# Keys are question forms, or the phrasing that a draft names.
PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "option": (
        "What does the {part} parameter of {object} control?",
        "In {object}, what does the {part} argument do?",
        "What is the role of {part} in {object}?",
        "What is the {part} parameter of {object} for?",
        "Explain the {part} parameter of {object}.",
    ),
    "input": (
        "What should be passed as {part} to {object}?",
        "What is {part} in a call to {object}?",
        "What does the {part} argument of {object} stand for?",
        "Which input does {object} expect as {part}?",
    ),
    "inputs": (
        "What should be passed as {part} to {object}?",
        "What are {part} in a call to {object}?",
        "What do the arguments {part} of {object} stand for?",
    ),
    "fitted_attribute": (
        "What does the attribute {part} of a fitted {object} hold?",
        "After fitting {object}, what is stored in {part}?",
        "What can I read from {part} once {object} has been fitted?",
    ),
    "attribute_meaning": (
        "What is the {part} attribute of {object}?",
        "What does {part} hold on an instance of {object}?",
        "Which information does {object} keep in {part}?",
    ),
    "function_purpose": (
        "What does {object} do?",
        "What is {object} used for?",
        "What is the purpose of {object}?",
        "Explain briefly what {object} does.",
    ),
    "method_purpose": (
        "What does {object} do?",
        "What happens when I call {object}?",
        "What is {object} for?",
    ),
    "class_purpose": (
        "What is {object}?",
        "Describe {object} in a few words.",
        "Explain briefly what {object} is.",
    ),
    "return_value": (
        "What does {object} return?",
        "What is the result of calling {object}?",
        "What do I get back from {object}?",
        "Describe the return value of {object}.",
    ),
    "default_value": (
        "What is the default value of {part} in {object}?",
        "Which value does {object} use for {part} if I do not pass one?",
        "What does {part} default to in {object}?",
    ),
    "parameter_options": (
        "Which values does {part} accept in {object}?",
        "What can {part} be set to in {object}?",
        "What are the allowed values of {part} in {object}?",
    ),
    "array_shape": (
        "What is the type and shape of {part} in {object}?",
        "Which shape does {part} have in {object}?",
        "What kind of array is {part} in {object}, and what is its shape?",
    ),
    "exception_raised": (
        "When does {object} raise {part}?",
        "Under which condition is {part} raised by {object}?",
        "What causes {object} to raise {part}?",
    ),
    "usage_note": (
        "What should I keep in mind when using {object}?",
        "What is worth knowing about how {object} works?",
        "Is there something to note about {object}?",
    ),
    "related_objects": (
        "What is related to {object}, and what is it for?",
        "Besides {object}, what else should I look at for similar tasks?",
        "Which alternatives or companions does {object} have?",
    ),
    "function_for_task": (
        "Which {library} function {part}?",
        "Name the {library} function that {part}.",
        "I need a {library} function that {part}. Which one is it?",
    ),
    "required_arguments": (
        "Which arguments does {object} require, and which are optional?",
        "What do I have to pass to {object}?",
        "Which arguments of {object} have no default?",
    ),
}


def stable_choice(key: str, count: int) -> int:
    """Return a number below `count` by a hash of the key, equal on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % count


def _question(entry: DocumentedObject, phrasing: str, part: str, is_ambiguous: bool) -> str:
    """Return one of the phrasings, chosen by a hash of the question's content."""
    key = f"{phrasing}|{entry.name}|{part}"
    name = f"`{entry.name}`"
    # Half of the questions use library and short name, if that is unique.
    if not is_ambiguous and stable_choice(f"name|{key}", 2):
        name = f"{entry.library}'s `{entry.short_name}`"
    choices = PHRASINGS[phrasing]
    text = choices[stable_choice(key, len(choices))]
    return text.format(object=name, part=part, library=entry.library)


def _is_plain(text: str) -> bool:
    return (
        is_self_contained(text) and text.isprintable() and not re.search(r"  |`\s*`|,\.|;\.", text)
    )


def make_pairs(entry: DocumentedObject, is_ambiguous: bool) -> list[Pair]:
    """Make all pairs of one object; duplicates among objects are not removed.

    `is_ambiguous`: another object has the same short name, so that the qualified name is used.
    """
    name = f"`{entry.name if is_ambiguous else entry.short_name}`"
    drafts = [
        *purpose_drafts(entry, name),
        *parameter_drafts(entry, name),
        *attribute_drafts(entry),
        *shape_drafts(entry, name),
        *result_drafts(entry, name),
        *argument_drafts(entry, name),
        *exception_drafts(entry, name),
        *note_drafts(entry, name),
        *related_drafts(entry, name),
    ]
    return [
        Pair(
            instruction=_question(
                entry, draft.phrasing or draft.category, draft.part, is_ambiguous
            ),
            response=draft.response,
            category=draft.category,
            owner=entry.owner,
            fact=draft.fact,
        )
        for draft in drafts
        if MIN_CHARACTERS <= len(draft.response) <= MAX_CHARACTERS and _is_plain(draft.response)
    ]
