"""Question forms about an object's purpose, arguments, results, exceptions, notes and relatives."""

from __future__ import annotations

import re
from collections.abc import Iterator

from slm_lora.ml_qa.cleaning import usable_sentences
from slm_lora.ml_qa.drafts import (
    Draft,
    join_list,
    mask_names,
    plain_words,
    split_arguments,
    word_count,
)
from slm_lora.ml_qa.english import has_main_verb, lower_first, starts_with_verb
from slm_lora.ml_qa.objects import DocumentedObject
from slm_lora.ml_qa.sentences import (
    continue_sentences,
    describe_action,
    describe_result,
    describe_thing,
    describe_value,
)

_MAX_OPENING_CHARACTERS = 400
_MAX_RESULT_CHARACTERS = 300
_MAX_NOTE_CHARACTERS = 450
_MIN_RESULT_WORDS = 5
_MIN_NOTE_WORDS = 14  # shorter notes are asides
_MAX_NAMED_OPTIONS = 5


def purpose_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask for the purpose of the object, and for the function of a purpose."""
    summary = usable_sentences(entry.doc["Summary"])
    if not summary:
        return
    room = _MAX_OPENING_CHARACTERS - len(summary[0])
    more = summary[1:] + usable_sentences(entry.doc["Extended Summary"], room)
    acts = entry.kind in {"function", "method"}
    first = (describe_action if acts else describe_thing)(name, summary[0])
    if not first:
        return
    later = continue_sentences(more, of_action=acts)[:3]
    # Names are not masked: a summary that differs in its name only is of another object.
    fact = plain_words(summary[0])
    if entry.kind == "distribution":
        later = [*_shape_parameters(entry), *later]
    if word_count(fact) < 3 or (entry.kind == "distribution" and not later):
        return
    form = "class_purpose" if not acts else f"{entry.kind}_purpose"
    yield Draft(form, " ".join([first, *later]), fact)
    task = describe_action("", summary[0]) if entry.kind == "function" else None
    names_itself = "_" in mask_names(entry, summary[0]).split()
    if task and 6 <= len(task.split()) <= 30 and not names_itself:
        answer = f"The function is `{entry.name}`. {_call(entry)}".strip()
        yield Draft("function_for_task", answer, f"task {fact}", task.strip().rstrip("."))


def _shape_parameters(entry: DocumentedObject) -> list[str]:
    """Return a sentence on the shape parameters of a distribution, if its notes name them."""
    match = re.search(
        r"takes ((?:``\w+``(?:, and | and |, )?)+) as (?:a )?shape parameters?\b",
        " ".join(" ".join(entry.doc["Notes"]).split()),
    )
    if match is None:
        return []
    names = [f"`{name}`" for name in re.findall(r"\w+(?=``)", match.group(1))]
    plural = "shape parameters" if len(names) > 1 else "a shape parameter"
    return [f"It takes {join_list(names)} as {plural}."]


def _call(entry: DocumentedObject) -> str:
    arguments = split_arguments(entry)
    if arguments is None:
        return ""
    required, optional = arguments
    if not required:
        return "All its arguments are optional." if optional else "It takes no arguments."
    text = f"It requires {join_list(required)}"
    if not optional:
        return f"{text} and has no optional arguments."
    shown = join_list(optional[:_MAX_NAMED_OPTIONS])
    if len(optional) > _MAX_NAMED_OPTIONS:
        return f"{text}; {shown} are among the optional arguments."
    return f"{text}; {shown} {'is' if len(optional) == 1 else 'are'} optional."


def argument_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask which arguments are required and which are optional."""
    arguments = split_arguments(entry)
    if arguments is None or entry.kind == "method":
        return
    required, optional = arguments
    if required and optional and len(required) <= 6:
        answer = name + _call(entry).removeprefix("It")
        fact = plain_words(f"arguments {' '.join([*required, *optional[:_MAX_NAMED_OPTIONS]])}")
        yield Draft("required_arguments", answer, fact)


def result_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask what the function or method returns."""
    results = entry.doc["Returns"]
    sentences = [usable_sentences(result.desc, _MAX_RESULT_CHARACTERS) for result in results]
    if not 1 <= len(results) <= 4 or not all(sentences):
        return
    named = all(re.fullmatch(r"[A-Za-z]\w*", result.name) for result in results)
    described = [
        describe_value(result.name, description[0]) if named else None
        for result, description in zip(results, sentences, strict=True)
    ]
    names = join_list([f"`{result.name}`" for result in results])
    own_name = entry.name.rsplit(".", 1)[-1]
    first = describe_result(name, sentences[0][0]) if len(results) == 1 else None
    # "`f` returns `f`." has no content.
    if first is None and all(described) and names != f"`{own_name}`":
        first = f"{name} returns {names}. {' '.join(filter(None, described))}"
    if first is None:
        return
    later = continue_sentences(sentences[0][1:]) if len(results) == 1 else []
    fact = mask_names(entry, " ".join([*(description[0] for description in sentences), *later]))
    if word_count(fact) >= _MIN_RESULT_WORDS:
        yield Draft("return_value", " ".join([first, *later]), fact)


def exception_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask when the function or method raises an exception."""
    raised = [(error.type or error.name).strip("`~") for error in entry.doc["Raises"]]
    for type_name, error in zip(raised, entry.doc["Raises"], strict=True):
        exception = type_name.rsplit(".", 1)[-1]
        sentences = usable_sentences(error.desc)
        # An exception with several conditions is left out: the answer would be incomplete.
        if not sentences or raised.count(type_name) > 1 or not re.fullmatch(r"[A-Z]\w+", exception):
            continue
        match = re.match(
            r"(?:(?:It is |Is )?raised )?(?=(?:if|when|in case|unless|for) )", sentences[0], re.I
        )
        if match:
            condition = sentences[0][match.end() :]
            condition = condition[0].lower() + condition[1:]
            answer = f"{name} raises `{exception}` {condition}"
            yield Draft("exception_raised", answer, mask_names(entry, condition), f"`{exception}`")


_DEPENDS_ON_CONTEXT = re.compile(
    r"(?:These|They|It|Its|Such|However|Also|Thus|Here|Both|That|Then|But|So|Because|One|We|Let)\b"
)
_THIS_OBJECT = re.compile(
    r"^This (?:function|class|method|routine|estimator|transformer|distribution|implementation)"
    r"(?= (?:\w+s|can|may|will|must)\b)"
)


def note_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask for the first facts of the notes or warnings, if they are self-contained."""
    for section in ("Notes", "Warnings"):
        sentences = usable_sentences(entry.doc[section], _MAX_NOTE_CHARACTERS)
        if not sentences or _DEPENDS_ON_CONTEXT.match(sentences[0]):
            continue
        first: str | None = _THIS_OBJECT.sub(name, sentences[0])
        if starts_with_verb(sentences[0]):
            first = describe_action(name, sentences[0])
        if not first or first.startswith("This ") or first[0].islower():
            continue
        if not re.match(r"(?:If|When|For|In)\b", first) and not has_main_verb(first):
            continue
        text = " ".join([first, *continue_sentences(sentences[1:])])
        fact = mask_names(entry, text)
        if word_count(fact) >= _MIN_NOTE_WORDS:
            yield Draft("usage_note", text, fact)
            return


def related_drafts(entry: DocumentedObject, name: str) -> Iterator[Draft]:
    """Ask for related objects, with their descriptions."""
    related = []
    for names, description in entry.doc["See Also"]:
        sentences = usable_sentences(description)
        if len(names) != 1 or not sentences or not re.fullmatch(r"[\w.]+", names[0][0]):
            continue
        target = names[0][0].rsplit(".", 1)[-1]
        action = describe_action("", sentences[0])
        text = (action.strip() if action else lower_first(sentences[0])).rstrip(".")
        if target == entry.name.rsplit(".", 1)[-1] or len(text) < 15 or re.search("[:(]", text):
            continue
        if not re.search(
            r"^(?:for|see|same|like|as)\b|belongs|\bthis\b|\betc|example|hypothesis",
            f"{text} {target}",
        ):
            related.append(f"`{names[0][0]}` ({text})")
    if related:
        verb = "is" if len(related) == 1 else "are"
        answer = f"Related to {name} {verb} {join_list(related[:4])}."
        yield Draft("related_objects", answer, mask_names(entry, answer))
