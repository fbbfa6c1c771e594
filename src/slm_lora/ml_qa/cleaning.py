"""Convert the reStructuredText of a docstring section to plain, complete sentences.

Doubtful text is discarded: a sentence that depends on removed content (a formula, a citation, a
list, a figure) is dropped, with all text after it.
"""

import re
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest

from slm_lora.ml_qa.blocks import Block, split_blocks

MAX_SENTENCES = 4
MAX_CHARACTERS = 520  # of the kept text; question forms add a subject, up to 600 characters
MAX_ITEM_CHARACTERS = 150

# Placeholder for removed markup that the sentence may depend on.
LOST = "\x00"


_MATH_ROLE = re.compile(r":math:`([^`]*)`")
_NUMBER_ROLE = re.compile(r":(?:doi|arxiv|issue|gh|pr|user|cite|footcite|eq|numref):`[^`]*`")
_PEP_ROLE = re.compile(r":pep:`(\d+)`")
_PROSE_ROLE = re.compile(r":(?:term|ref|doc|any):`([^`<]+?)\s*(?:<[^`>]*>)?`")
_ANY_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_NAMED_LINK = re.compile(r"`([^`]+)`__?(?!\w)")
_CITATION = re.compile(
    r"\s*\[(?:\d+|[A-Z][\w+-]*\d{2,4}\w?|[A-Z]{1,4}\d*|CIT\w+|[Rr][\w-]+)\]_(?!\w)"
)
_GRAMMATICAL_CITATION = re.compile(
    r"(?:\b(?:in|of|from|by|see|and|to|at|with|or|per|also|reference|references|refs?\.?|eq\.?|"
    r"following|section|chapter|table|theorem|equation|algorithm)|\(|,)\s*(?:\[[^\]\s]+\]_)",
    re.IGNORECASE,
)
# [0] and [0, 1] are values, not citations.
_PLAIN_CITATION = re.compile(r"\s\[[1-9]\d?\](?!_?\w)")
_URL = re.compile(r"(?:https?|ftp)://\S+|www\.\S+")
_STRONG = re.compile(r"(?<![\w*`])\*\*([^\s*](?:[^*`]*[^\s*])?)\*\*(?![\w*])")
_EMPHASIS = re.compile(r"(?<![\w*`/(])\*([^\s*](?:[^*`]*[^\s*])?)\*(?![\w*])")


# Typographic quotes and dashes as they are typed.
_TYPOGRAPHY = {0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: " - "}


def _math(match: re.Match[str]) -> str:
    formula = match.group(1).strip()
    return LOST if not formula or "\\" in formula else f"`{formula}`"


def _prose_role(match: re.Match[str]) -> str:
    # A reference without a title would show its label, which is not prose.
    text = match.group(1)
    if match.group(0).startswith((":ref:", ":doc:", ":any:")) and "<" not in match.group(0):
        return LOST
    return text


def _code_role(match: re.Match[str]) -> str:
    target = match.group(1).strip()
    if titled := re.fullmatch(r"([^<]+?)\s*<[^>]*>", target):
        target = titled.group(1)
    if target.startswith("~"):
        target = target.rsplit(".", 1)[-1]
    return f"`{target.lstrip('!.~')}`"


def clean_inline(text: str) -> str:
    """Return the plain text of a paragraph, with code in single backticks and no other markup.

    `LOST` replaces removed content that the sentence may depend on.
    """
    text = " ".join(text.split())
    text = text.replace("\\ ", "").replace("``", "`").translate(_TYPOGRAPHY)
    text = _MATH_ROLE.sub(_math, text)
    text = _NUMBER_ROLE.sub(LOST, text)
    text = _PEP_ROLE.sub(r"PEP \1", text)
    text = _PROSE_ROLE.sub(_prose_role, text)
    text = _ANY_ROLE.sub(_code_role, text)
    text = _LINK.sub(r"\1", text)
    text = _NAMED_LINK.sub(lambda m: m.group(1) if m.group(0).endswith("_") else m.group(0), text)
    text = _URL.sub(LOST, text)
    text = re.sub(r"`~(?:[\w]+\.)*([\w.]+)`", r"`\1`", text)
    text = "".join(
        part if part.startswith("`") else _unmark_prose(part)
        for part in re.split(r"(`[^`]*`)", text)
    )
    # A parenthesis with a cross-reference is not needed.
    text = re.sub(r"\s*\((?:see|cf\.?|refer to)\b[^()]*\)", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+([.,;:)])(?=\s|$)", r"\1", text)
    return " ".join(text.split())


def _unmark_prose(text: str) -> str:
    text = _GRAMMATICAL_CITATION.sub(LOST, text)
    text = _CITATION.sub("", text)
    text = _PLAIN_CITATION.sub("", text)
    text = _STRONG.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\1", text)
    return text.replace("\\*", "*").replace("\\_", "_").replace("\\|", "|")


_ABBREVIATION = re.compile(
    r"(?:\b(?i:e\.g|i\.e|etc|vs|cf|eq|eqs|fig|ref|refs|resp|approx|al|a\.k\.a|aka|w\.r\.t|dim|no"
    r"|sec|ch|pp|ed|vol|dr|st)|(?<![\w'])[A-Z])\.$"
)


_STARTS_SENTENCE = re.compile(r"[\"']?\s+(?:[\"'(]?[A-Z0-9`\"']|(?:scipy|numpy|sklearn)\b)")


def split_sentences(text: str) -> list[str]:
    """Split a cleaned paragraph, but not at dots in code, brackets and abbreviations."""
    sentences: list[str] = []
    start, depth, in_code = 0, 0, False
    for i, character in enumerate(text):
        if character == "`":
            in_code = not in_code
        elif in_code:
            continue
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
        elif character in ".!?" and depth == 0:
            after = text[i + 1 :]
            if not _STARTS_SENTENCE.match(after) or _ABBREVIATION.search(text[start : i + 1]):
                continue
            sentences.append(text[start : i + 1].strip())
            start = i + 1
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


# Sentences that are cross-references: the text around them is complete without them.
_CROSS_REFERENCE = re.compile(
    r"^(?:\(?(?:read more|see|see also|refer to|please see|please refer|for more|for further|"
    r"for (?:a |an |the )?(?:\w+ )*(?:examples?|comparisons?|details?|discussion|description|"
    r"explanation|information|introduction|list|overview|demonstration|definition)|for usage|"
    r"more (?:details|information)|an example|a detailed example|details (?:can|are)|"
    r"the documentation|cf\.|compare|optional\.$|new in|added in|changed in)\b)",
    re.IGNORECASE,
)
_REFERS_ELSEWHERE = re.compile(
    r"\b(?:below|above|earlier|previous(?:ly)? (?:section|mentioned|described)|user guide|"
    r"glossary|docstring|documentation|tutorial|deprecated|deprecation|backwards? compatib|"
    r"in version|since version|removed in|will be removed|example below|this example|"
    r"notes? section|"
    r"in the notes|see notes?|section|eqs?\.|equation|figure|fig\.|table [0-9]|"
    r"the following|as follows|following (?:are|is|options|values|keys|attributes)|"
    r"see also|[,;] see|examples? (?:for|of|are|in)|the examples?|references?\)|"
    r"see (?:the|`|here|for)|refer to|refs?\.|for (?:more )?details|described (?:in|by) \[|"
    r"(?:introduced|described|proposed|published|presented) in|the image|image illustrates|vol\.|"
    r"versionadded|versionchanged|the paper|this page|todo|fixme|xxx|v?0\.\d+\.\d+)(?!\w)|"
    r"(?:numpy|scipy|scikit-learn) v?\d|"
    r"::|>>>|[,;] see\b|(?:first|second|last) example|\|\||__\w+__ *=|\\",
    re.IGNORECASE,
)  # fmt: skip


def _is_balanced(text: str) -> bool:
    prose = re.sub(r"`[^`]*`", "", text)
    # Half-open intervals such as [0, 1) are balanced only when both kinds count as one.
    opened = sum(prose.count(bracket) for bracket in "([{")
    closed = sum(prose.count(bracket) for bracket in ")]}")
    return text.count("`") % 2 == 0 and opened == closed and prose.count('"') % 2 == 0


@cache
def is_self_contained(sentence: str) -> bool:
    """Whether a sentence has no removed content, unbalanced brackets or cross-references."""
    prose = re.sub(r"`[^`]*`", "`x`", sentence)
    return (
        LOST not in sentence
        and _is_balanced(sentence)
        and not _REFERS_ELSEWHERE.search(prose)
        and not re.search(r"\.\.(?!\.)(?<!\.\.\.)|:[a-z]+:`|``|\]_|`_", sentence)
        and not sentence.rstrip(".").endswith((",", ";", "-", "(", " and", " or", "i.e", "e.g"))
        # A full stop before a lower-case letter: a typing error or a broken line.
        and not re.search(
            r"(?<!\.[a-z])(?<!etc)(?<!vs)(?<!resp)(?<!approx)(?<!al)\. [a-z]", sentence
        )
        and not re.search(r"\b(the|a|an|is|of|to|in|and) \1\b", sentence)
        and not re.search(r"(?<!\S)\*\w|\[[A-Z][A-Za-z]*\d{2,4}[a-z]?\]", prose)
        # A capital letter without a full stop before it: lines that are not one sentence.
        and not re.search(r"[a-z0-9`)] (?:If|When|The|This|It|A) [a-z`]", prose)
        and not re.search(r"[a-z]- (?!and\b|or\b|to\b)", prose)
        and not re.search(r"\b(?:I|me|my)\b(?!\.|-)", prose)
    )


# Endings that announce a list and are meaningless without it.
_ANNOUNCES = re.compile(
    r"(?:\b(?:following|one of|any of|options?|are|is|be|either|by|values?|includes?|such as|as|of|"
    r"can|supported|available|possible|valid|choices|two|three|if|when|then|that|where|with|to|"
    r"keys?|fields?|attributes?|follows|example|e\.g\.|i\.e\.|form|signature|default|"
    r"methods?|modes?|strings?|arguments?|parameters?))\s*:$",
    re.IGNORECASE,
)


def _join_items(items: Sequence[str]) -> str | None:
    """Join a short list to clauses separated by semicolons; None if its items are unsuitable."""
    cleaned = []
    for item in items:
        text = clean_inline(item)
        if len(split_sentences(text)) != 1 or len(text) > MAX_ITEM_CHARACTERS:
            return None
        text = re.sub(r"[.,;]*(?:\s+(?:and|or))?$", "", text).rstrip(".,;")
        if not text or text.endswith(":") or not is_self_contained(text):
            return None
        cleaned.append(text)
    return "; ".join(cleaned) + "." if 2 <= len(cleaned) <= 7 else None


def usable_sentences(lines: Sequence[str], max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Return the leading self-contained sentences of a section, at most `MAX_SENTENCES`.

    Reading stops at the first sentence or block that is not self-contained, because later text
    may depend on it. Cross-references are skipped.
    """
    return list(_usable_sentences(tuple(lines), max_characters))


# Half of all parameter descriptions occur verbatim in several objects.
@cache
def _usable_sentences(lines: tuple[str, ...], max_characters: int) -> tuple[str, ...]:
    kept: list[str] = []
    blocks = split_blocks(lines)
    for block, following in zip_longest(blocks, blocks[1:]):
        if block.kind != "text":
            break
        sentences = split_sentences(clean_inline(block.parts[0]))
        for number, sentence in enumerate(sentences):
            if _CROSS_REFERENCE.match(sentence) and not sentence.endswith(":"):
                continue
            ends_block = number == len(sentences) - 1
            completed = _complete(sentence, following, bool(kept)) if ends_block else sentence
            if completed is None or not _is_sentence(completed):
                return tuple(kept)
            if kept and sum(map(len, kept)) + len(completed) > max_characters:
                return tuple(kept)
            kept.append(completed)
            # Text after a list is about the list.
            if len(kept) == MAX_SENTENCES or sentence.endswith(":"):
                return tuple(kept)
    return tuple(kept)


def _is_sentence(text: str) -> bool:
    # "the following options: a; b." is complete, as its list is included.
    checked = text.replace("following ", "", 1) if ": " in text else text
    return is_self_contained(checked) and text.endswith((".", "!", '."', ".'"))


def _complete(sentence: str, following: Block | None, has_earlier: bool) -> str | None:
    """Add its list or full stop to the last sentence of a paragraph; None if it is incomplete."""
    if sentence.endswith(":"):
        items = _join_items(following.parts) if following and following.kind == "items" else None
        if items is not None:
            return f"{sentence} {items}"
        # "The solver to use:" is complete without its list, "Allowed values are:" is not.
        return None if has_earlier or _ANNOUNCES.search(sentence) else f"{sentence[:-1]}."
    if sentence[-1:].isalnum() or sentence[-1:] in "`)":
        # Without a full stop the sentence continues in the next formula or list.
        return f"{sentence}." if following is None or following.kind == "text" else None
    return sentence
