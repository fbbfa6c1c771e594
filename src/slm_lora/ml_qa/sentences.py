"""Complete fragments of docstrings to sentences with a subject.

"Number of trees in the forest." becomes "`n_estimators` is the number of trees in the forest.",
"Compute the mean." becomes "`f` computes the mean.". Ambiguous fragments are refused.
"""

from __future__ import annotations

import re

from slm_lora.ml_qa.english import (
    AUXILIARIES,
    FINITE_VERBS,
    FUNCTION_FORMS,
    FUNCTION_VERBS,
    PARAMETER_FORMS,
    PARAMETER_VERBS,
    has_main_verb,
    head_words,
    is_clause,
    is_plural,
    lower_first,
    noun_phrase,
    split_first_word,
    third_person,
    with_indefinite,
    word_set,
)

_VALUE_WORDS = (
    r"True|False|None|not None|[\"'][^\"']*[\"']|`[^`=<>]*`|-?\d+(?:\.\d+)?|given|provided|"
    r"specified|supplied|omitted|unspecified|not given|not provided|not specified|set|not set|"
    r"positive|negative|nonzero|zero|callable"
)
_TYPE_WORDS = (
    r"int|integer|float|str|string|list|tuple|dict|dictionary|array|ndarray|scalar|number|"
    r"sequence|boolean|bool"
)
_IF_VALUE = re.compile(
    rf"^(If|When)(?: it is| this is| this| it's)?(?: set to| equal to)? "
    rf"(?:((?:{_VALUE_WORDS})(?: or (?:{_VALUE_WORDS}))?)|((?:an? )?(?:{_TYPE_WORDS})))"
    rf"(?= ?(?:,|\(|then\b))"
)
_THIS_PARAMETER = re.compile(
    r"^(?:This|The) (?:parameter|argument|option|attribute|keyword|flag|hyper-?parameter|value|"
    r"setting|property)(?: `[^`]*`)? (?=[a-z])"
)
_USED = re.compile(
    r"^(?:(?:Only |Not |Un|Always )?(?:used|ignored|considered|relevant|useful|effective)|"
    r"Equivalent to|Equal to|Required (?:if|when|for|by)|Significant)\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"^[^,]+, (?:then )?(.+)")
_OPENS_CLAUSE = word_set(
    """
    if when for in by with unless on note since as otherwise however thus therefore hence then
    typically usually here instead conversely alternatively moreover furthermore additionally
    """
)
# First words of fragments with an unclear subject.
_UNSURE = word_set(
    """
    to see default defaults optional not never please only same currently possible available there
    here let must set used raised true false
    """
)


def quote_names(name: str) -> tuple[str, bool]:
    """Return the names of "a, b" as "`a` and `b`", and whether there are several."""
    parts = [f"`{part.strip()}`" for part in name.split(",") if part.strip()]
    if len(parts) == 1:
        return parts[0], False
    return f"{', '.join(parts[:-1])} and {parts[-1]}", True


def _mentions(text: str, name: str) -> bool:
    return set(re.findall(r"\w+", name)) <= set(re.findall(r"\w+", text))


def describe_value(name: str, first: str) -> str | None:
    """Return a sentence that describes the parameter, attribute or result `name`.

    `first` is the first cleaned sentence of its description. None if the fragment is ambiguous.
    """
    subject, several = quote_names(name)
    opening, rest = split_first_word(first)
    if not rest or not re.match(r"[A-Z0-9`'\"]", first):
        return None
    lowered = first[0].lower() + first[1:]
    is_or_are = "are" if several else "is"
    if match := _IF_VALUE.match(first):
        clause = re.match(r"^[^,:]*?(?:, then |, | then )(.+)", first)
        if several or not clause or not is_clause(clause.group(1)):
            return None
        value, kind = match.group(2), match.group(3)
        if kind:
            value = kind if re.match(r"an? ", kind) else with_indefinite(kind)
        return f"{match.group(1)} {subject} is {value}{first[match.end() :]}"
    if opening in _OPENS_CLAUSE:
        clause = _CLAUSE.match(first)
        known = clause and is_clause(clause.group(1)) and _mentions(first, name)
        return first if known and opening != "by" else None
    if match := _THIS_PARAMETER.match(first):
        return f"{subject} {first[match.end() :]}" if has_main_verb(first) and not several else None
    if opening in {"this", "it"}:
        verb = split_first_word(rest)[0]
        known = verb in AUXILIARIES | FINITE_VERBS or verb in PARAMETER_FORMS
        return f"{subject} {rest}" if known and not several else None
    if opening in AUXILIARIES:
        return None if several else f"{subject} {lowered}"
    if _USED.match(first):
        return f"{subject} {is_or_are} {lowered}"
    if opening in {"whether", "how", "which", "where", "what"} and not first.endswith("?"):
        return f"{subject} {'specify' if several else 'specifies'} {lowered}"
    if re.match(r"^True (?:if|when)\b", first):
        return f"{subject} is {first}"
    if match := re.match(r"^Set (?:this |it )?to (?=\S)", first):
        return f"{subject} can be set to {first[match.end() :]}"
    is_verb = opening in PARAMETER_FORMS or opening in PARAMETER_VERBS
    if is_verb and not re.match(r"(?:of|for|in|on|to|from|at|by|and|or)\b", rest):
        if several or (opening in PARAMETER_VERBS and has_main_verb(first)):
            return None
        return f"{subject} {third_person(PARAMETER_FORMS.get(opening, opening))} {rest}"
    if has_main_verb(first):
        verb_first = (
            opening in FUNCTION_FORMS or opening in FUNCTION_VERBS or _VERB_OBJECT.match(rest)
        )
        return first if _mentions(first, name) and not verb_first else None
    if not _is_noun_phrase(first):
        return None
    phrase, plural = noun_phrase(first)
    if not several and not plural:
        phrase = re.sub(r"; (?=(?:must|should|can|may|will|has|is|defaults) )", "; it ", phrase)
    return f"{subject} {is_or_are if several else 'holds' if plural else 'is'} {phrase}"


# "Pass an int", "Stop when": words after a verb that is in none of the lists.
_VERB_OBJECT = re.compile(r"(?:a|an|the|all|each|any|it|this|up|when|if|once|until)\b")


def _is_noun_phrase(text: str) -> bool:
    """Whether a fragment without a finite verb is clearly a noun phrase."""
    opening, rest = split_first_word(text)
    is_verb = opening in FUNCTION_VERBS or opening in FUNCTION_FORMS
    # "Set of", "Scale for", "Test set": verbs that are used as nouns.
    as_noun = re.match(r"(?:of|from|for|values?|functions?|matrix|size|type|set)\b", rest)
    if is_verb and not as_noun:
        return False
    prose = re.sub(r"`[^`]*`", "", text)
    return not (
        opening in _UNSURE
        or text.startswith("`")
        or opening.endswith("ly")
        or _VERB_OBJECT.match(rest)
        # "The rate shrinks the steps": likewise.
        or re.search(r"\b[a-z]+s (?:the|a|an|each|its|if)\b|, [a-z]+s (?:the|a|an)\b", prose)
        or re.match(r"(?i:non-?zero|zero|\d+|none|positive|negative) (?:to|if|for)\b", prose)
        or re.match(r"[\d.]+ ?[=:]", text)
        or len(re.findall(r"[A-Za-z]{2,}", prose)) < 2
        or not head_words(text)
    )


_COORDINATED = re.compile(
    r"(,? (?:and|or|then|and then) )([a-z]+)(?= (?:the|a|an|it|them|its|their|all|each|those|any|"
    r"this|return|predict|transform|[Xy]\b|`)|\.$| accordingly)"
)
_UNCOORDINATED = re.compile(
    rf"\b(?:and|or|then|optionally) (?:{'|'.join(sorted(FUNCTION_VERBS))})\b"
)


def describe_action(subject: str, summary: str) -> str | None:
    """Return a sentence on the action of the function or method `subject`; None if ambiguous."""
    summary = re.sub(r"^This (?:function|method|routine) (?=[a-z])", "", summary)
    opening, rest = split_first_word(summary)
    adverb = ""
    if re.fullmatch(r"[a-z]{4,}ly", opening):
        adverb = f"{opening} "
        opening, rest = split_first_word(rest)
    verb = FUNCTION_FORMS.get(opening, opening)
    if verb not in FUNCTION_VERBS or not rest or rest.startswith(("of ", "or ", ", ")):
        return None

    def conjugate(match: re.Match[str]) -> str:
        second = match.group(2)
        return match.group(1) + (third_person(second) if second in FUNCTION_VERBS else second)

    if opening == verb:
        rest = _COORDINATED.sub(conjugate, rest)
        # An unknown second verb would keep the wrong form.
        if _UNCOORDINATED.search(rest):
            return None
    return f"{subject} {adverb}{third_person(verb)} {rest}"


def describe_result(subject: str, first: str) -> str | None:
    """Return a sentence on the result of the function `subject`, from its description."""
    opening, rest = split_first_word(first)
    if opening in {"returns", "return"}:
        return f"{subject} returns {rest}" if rest and not rest.startswith("of ") else None
    if re.match(r"True (?:if|when)\b", first):
        return f"{subject} returns {first}"
    if (
        not rest
        or opening in _OPENS_CLAUSE
        or opening in {"this", "whether", "either", "each", "depending"}
        or opening in PARAMETER_FORMS
        or has_main_verb(first)
        or not _is_noun_phrase(first)
        or not re.match(r"[A-Z0-9]", first)
    ):
        return None
    return f"{subject} returns {noun_phrase(first)[0]}"


def describe_thing(subject: str, summary: str) -> str | None:
    """Return a sentence that defines the class or distribution `subject`; None if ambiguous."""
    opening, rest = split_first_word(summary)
    if not rest or opening in _OPENS_CLAUSE or opening in {"this", "given", "warning"}:
        return None
    if ":" in summary or re.match(r"^[\w.]+\(", summary):
        return None
    if opening in FUNCTION_FORMS or (opening in FUNCTION_VERBS and not rest.startswith("of ")):
        return describe_action(subject, summary)
    if has_main_verb(summary) or opening in _UNSURE:
        return None
    if opening in {"a", "an", "the", "one"}:
        return f"{subject} is {summary[0].lower()}{summary[1:]}"
    head = (head_words(summary) or [""])[-1]
    if is_plural(head) or re.match(r"(?:a|an|the|all|each|any)\b", rest):
        return None
    names_technique = re.search(r"(?:tion|sion|ing|analysis|ment)$", head)
    if names_technique and head not in {"function", "distribution", "exception", "string"}:
        return f"{subject} implements {lower_first(summary)}"
    return f"{subject} is {with_indefinite(lower_first(summary))}"


_DEFAULT = re.compile(r"^(?:The )?Default(?: value)?(?: is|:| =|s to) ", re.IGNORECASE)


def continue_sentences(sentences: list[str], *, of_action: bool = False) -> list[str]:
    """Return the sentences after the first, with a subject added where it is missing.

    With `of_action` they describe a function ("Returns ..." has it as the subject), otherwise a
    value. Stops at the first fragment with an unknown subject.
    """
    kept: list[str] = []
    for sentence in sentences:
        completed = _continue(sentence, of_action)
        if completed is None:
            break
        kept.append(completed)
    return kept


def _continue(sentence: str, of_action: bool) -> str | None:
    opening, _ = split_first_word(sentence)
    lowered = lower_first(sentence)
    if match := _DEFAULT.match(sentence):
        value = sentence[match.end() :]
        if re.match(r"(?:is|are|behaviou?r|to|values|when|if|for|will)\b", value):
            return sentence if has_main_verb(sentence) else None
        return f"The default is {value}"
    if opening in AUXILIARIES:
        # "Must be arrays" is plural: "it" would not agree.
        plural = re.match(r"\w+ be (?:arrays|of the same)\b|(?:are|have|do)\b", lowered)
        return None if plural else f"It {lowered}"
    if sentence.startswith("Only applies"):
        return f"It {lowered}"
    if _USED.match(sentence):
        return f"It is {lowered}"
    if opening in PARAMETER_FORMS or (opening in FUNCTION_FORMS and of_action):
        return f"It {lowered}"
    if opening in FUNCTION_FORMS:
        return None
    if opening in FUNCTION_VERBS and not has_main_verb(sentence):
        return describe_action("It", sentence) if of_action else None
    if opening in _OPENS_CLAUSE:
        clause = _CLAUSE.match(sentence)
        return sentence if clause and is_clause(clause.group(1)) else None
    if has_main_verb(sentence) or re.match(r"(?:This|It|These|They|We|You)\b", sentence):
        return sentence
    return None
