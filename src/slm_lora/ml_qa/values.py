"""Question forms about parameters and attributes."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Sequence

from slm_lora.ml_qa.cleaning import usable_sentences
from slm_lora.ml_qa.drafts import Draft, join_list, mask_names, word_count
from slm_lora.ml_qa.english import has_main_verb, lower_first, starts_with_verb, with_indefinite
from slm_lora.ml_qa.objects import DocumentedObject
from slm_lora.ml_qa.sentences import continue_sentences, describe_value, quote_names

# "Input array." has no information about the object; arguments of methods are mostly plain data.
_MIN_FACT_WORDS = 5
_MIN_METHOD_FACT_WORDS = 8

_NOT_WORTH_ASKING = re.compile(
    r"\.\. deprecated|not used|ignored|api consistency|present here for|exists for|exists only|"
    r"for compatibility|has no effect|reserved|unused|do not use|internal|should not be|"
    r"not intended",
    re.IGNORECASE,
)
_VAGUE = re.compile(
    r"(?:first|second|third|other) (?:input|argument|array|parameter)|many ways|ways to|"
    r"^Parameter of the distribution"
)


def _argument_with_default(entry: DocumentedObject, name: str) -> inspect.Parameter | None:
    """Return the parameter of the signature, if its default is a short literal."""
    parameter = entry.signature.parameters.get(name) if entry.signature else None
    if parameter is None or parameter.default is inspect.Parameter.empty:
        return None
    value = parameter.default
    items = value if type(value) is tuple else (value,)
    simple = all(type(item) in {bool, int, float, str, type(None)} for item in items)
    return parameter if simple and len(repr(value)) <= 40 else None


def _matches_docstring(type_text: str, value: object) -> bool:
    """Whether a default in the docstring, if there is one, equals the one of the signature."""
    match = re.search(r"default(?:\s*is\s*|\s*[=:]\s*|\s+)(.+)$", type_text)
    if match is None:
        return True
    literal = match.group(1).strip().strip("`")
    try:
        parsed = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        return literal == value
    return bool(parsed == value) and isinstance(parsed, bool) == isinstance(value, bool)


def _is_optional(entry: DocumentedObject, name: str, type_text: str) -> bool:
    if entry.signature and name in entry.signature.parameters:
        return entry.signature.parameters[name].default is not inspect.Parameter.empty
    return "optional" in type_text or "default" in type_text


def parameter_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask for the meaning of each parameter, its default and its allowed values."""
    for parameter in entry.doc["Parameters"] + entry.doc["Other Parameters"]:
        if not re.fullmatch(r"\*?[A-Za-z]\w*(?:, \*?[A-Za-z]\w*){0,2}", parameter.name):
            continue
        if _NOT_WORTH_ASKING.search(" ".join(parameter.desc)):
            continue
        subject, several = quote_names(parameter.name)
        sentences = usable_sentences(parameter.desc)
        first = describe_value(parameter.name, sentences[0]) if sentences else None
        if first and not _VAGUE.search(sentences[0]):
            later = continue_sentences(sentences[1:])
            fact = mask_names(entry, " ".join([sentences[0], *later]))
            optional = _is_optional(entry, parameter.name, parameter.type)
            phrasing = "inputs" if several else "option" if optional else "input"
            min_words = _MIN_METHOD_FACT_WORDS if entry.kind == "method" else _MIN_FACT_WORDS
            if word_count(fact) >= min_words:
                answer = " ".join([first, *later])
                yield Draft("parameter_meaning", answer, fact, subject, phrasing)
        if not several:
            yield from _default_drafts(entry, name, parameter.name, parameter.type, sentences)
            yield from _options_drafts(entry, name, parameter.name, parameter.type)


def _default_drafts(
    entry: DocumentedObject, name: str, parameter: str, type_text: str, sentences: Sequence[str]
) -> Iterator[Draft]:
    argument = _argument_with_default(entry, parameter)
    if argument is None or not _matches_docstring(type_text, argument.default):
        return
    value = repr(argument.default)
    answer = f"In {name}, `{parameter}` defaults to `{value}`."
    fact = f"default {parameter.casefold()} {value}"
    # The meaning of the default, if the description has it.
    opening = re.compile(rf"(?:If|When) `?{re.escape(value)}`?(?: \(default\))?, (?:then )?(.+)")
    for match in filter(None, map(opening.fullmatch, sentences)):
        meaning = match.group(1)
        if has_main_verb(meaning) and not starts_with_verb(meaning):
            answer = f"{answer[:-1]}, in which case {lower_first(meaning)}"
            fact = mask_names(entry, f"{parameter} {value} {meaning}")
            break
    yield Draft("default_value", answer, fact, f"`{parameter}`")


_CHOICES = re.compile(r"^\{([^{}]*)\}((?:,? optional)?(?:,? \(?default.*)?)$")


def _options_drafts(
    entry: DocumentedObject, name: str, parameter: str, type_text: str
) -> Iterator[Draft]:
    # Only a default may follow the braces: "{'a', 'b'} or callable" allows other values.
    match = _CHOICES.match(" ".join(type_text.split()))
    if not match:
        return
    try:
        options = ast.literal_eval(f"[{match.group(1)}]")
    except (ValueError, SyntaxError):
        return
    kinds = {type(option) for option in options}
    if not kinds <= {str, bool, int, float, type(None)} or str not in kinds:
        return
    if not 2 <= len(options) <= 10:
        return
    argument = _argument_with_default(entry, parameter)
    ending = "."
    if argument is not None and argument.default not in options:
        return
    if argument is not None:
        if not _matches_docstring(match.group(2), argument.default):
            return
        ending = f"; the default is `{argument.default!r}`."
    shown = join_list([f"`{option!r}`" for option in options], "or")
    fact = f"options {parameter} {' '.join(sorted(map(repr, options)))}"
    answer = f"In {name}, `{parameter}` can be {shown}{ending}"
    yield Draft("parameter_options", answer, fact, f"`{parameter}`")


_ARRAY_TYPE = re.compile(
    r"^(?P<kinds>(?:an? )?(?:ndarray|array[-_]like|array|sparse matrix|\{[a-z \-_,]+\}|"
    r"(?:CSR|csr) matrix|list|bool ndarray|ndarray of bool)) of shape (?P<shape>\([^()]*\)"
    r"(?:(?: or|, or|,) (?:of shape )?\([^()]*\))*)(?P<rest>,.*)?$"
)


def shape_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask for type and shape of array attributes and parameters."""
    for section in ("Attributes", "Parameters"):
        for value in entry.doc[section]:
            match = _ARRAY_TYPE.match(" ".join(value.type.split()))
            if not match or not re.fullmatch(r"\w+", value.name):
                continue
            if re.search(r"deprecated|ignored", " ".join(value.desc)):
                continue
            kinds = re.sub(r"^an? |[{}]", "", match.group("kinds"))
            kind = join_list([part.strip() for part in kinds.split(",")], "or")
            shape = re.sub(r"(\([^()]*\))", r"`\1`", match.group("shape"))
            ending = "."
            if section == "Parameters" and "None" in (match.group("rest") or ""):
                ending = ", or `None`."
            answer = (
                f"In {name}, `{value.name}` is {with_indefinite(kind)} of shape {shape}{ending}"
            )
            fact = f"shape {value.name} {kind} {shape}"
            yield Draft("array_shape", answer, fact, f"`{value.name}`")


def attribute_drafts(entry: DocumentedObject) -> Iterator[Draft]:
    """Ask for the meaning of each attribute."""
    for attribute in entry.doc["Attributes"]:
        if not re.fullmatch(r"[A-Za-z]\w*", attribute.name):
            continue
        if ".. deprecated" in " ".join(attribute.desc):
            continue
        sentences = usable_sentences(attribute.desc)
        first = describe_value(attribute.name, sentences[0]) if sentences else None
        if not first:
            continue
        later = continue_sentences(sentences[1:])
        fact = mask_names(entry, " ".join([sentences[0], *later]))
        if word_count(fact) < _MIN_FACT_WORDS:
            continue
        # scikit-learn marks attributes set by fit by a trailing underscore; plots are not fitted.
        is_fitted = entry.library == "scikit-learn" and attribute.name.endswith("_")
        phrasing = "fitted_attribute" if is_fitted and "Display" not in entry.name else ""
        answer = " ".join([first, *later])
        yield Draft("attribute_meaning", answer, fact, f"`{attribute.name}`", phrasing)
