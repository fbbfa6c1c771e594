"""Turn the reStructuredText of a docstring section into plain, complete sentences.

The rule throughout is to lose text rather than to keep doubtful text: a sentence that leans on
something that was removed (a formula, a citation, a list, a figure) is not kept, and neither is
what follows it.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_SENTENCES = 4
MAX_CHARACTERS = 520  # of the kept text; the question forms add a subject, and stop at 600
MAX_ITEM_CHARACTERS = 150

# Stands where markup was removed that the sentence around it may lean on.
LOST = "\x00"


class Block(NamedTuple):
    """One paragraph or list. `kind` is "text", "items" or "lost" (something that was removed)."""

    kind: str
    parts: tuple[str, ...]


# Directives that stand alone: the text before and after them is whole without them.
_DROPPED_DIRECTIVES = {
    "versionadded", "versionchanged", "deprecated", "legacy", "note", "warning", "tip", "seealso",
    "important", "caution", "attention", "hint", "admonition", "rubric", "index", "topic", "only",
}  # fmt: skip
_DIRECTIVE = re.compile(r"^\s*\.\.\s*([\w-]+)\s*::")
_COMMENT = re.compile(r"^\s*\.\.(\s|$)")
_BULLET = re.compile(r"^(\s*)(?:[-*+•]|\(?[0-9a-zA-Z][.)]|\(?[ivx]+\)|#\.)\s+(?=\S)")
_TABLE = re.compile(r"^\s*(?:[=+|-]{3,}|[-=~^\"]{3,}(\s|$)|\+[-=]+|\|.*\|\s*$)")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _end_of_indented(lines: Sequence[str], start: int, indent: int) -> int:
    """Index of the first line from `start` on that is not blank and not deeper than `indent`."""
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
        end += 1
    return end


def split_blocks(lines: Sequence[str]) -> list[Block]:
    """Paragraphs and lists of a docstring section, in order, directives and code taken out."""
    blocks: list[Block] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
        elif directive := _DIRECTIVE.match(line):
            end = _end_of_indented(lines, i + 1, _indent(line))
            if directive.group(1) not in _DROPPED_DIRECTIVES:
                blocks.append(Block("lost", ()))
            i = end
        elif _COMMENT.match(line):
            i = _end_of_indented(lines, i + 1, _indent(line))
        elif line.lstrip().startswith(">>>") or _TABLE.match(line):
            blocks.append(Block("lost", ()))
            while i < len(lines) and lines[i].strip():
                i += 1
        elif _BULLET.match(line):
            i, block = _read_items(lines, i)
            blocks.append(block)
        else:
            i, found = _read_paragraph(lines, i)
            blocks.extend(found)
    return blocks


def _read_items(lines: Sequence[str], start: int) -> tuple[int, Block]:
    indent = _indent(lines[start])
    items: list[str] = []
    whole = True
    i = start
    while i < len(lines):
        line = lines[i]
        bullet = _BULLET.match(line)
        if not line.strip():
            # A blank line ends the list unless another item, or the body of this one, follows.
            following = next((text for text in lines[i:] if text.strip()), "")
            if not (_BULLET.match(following) or _indent(following) > indent):
                break
            if not _BULLET.match(following) or _indent(following) != indent:
                whole = False
        elif bullet and _indent(line) == indent:
            items.append(line[bullet.end() :].strip())
        elif _indent(line) > indent:
            whole = whole and not bullet and not _DIRECTIVE.match(line)
            items[-1] += " " + line.strip()
        else:
            break
        i += 1
    return i, Block("items", tuple(items)) if whole else Block("lost", ())


def _read_paragraph(lines: Sequence[str], start: int) -> tuple[int, list[Block]]:
    indent = _indent(lines[start])
    end = start + 1
    while end < len(lines) and lines[end].strip() and _indent(lines[end]) == indent:
        if _BULLET.match(lines[end]) and lines[end - 1].rstrip().endswith(":"):
            break
        if _DIRECTIVE.match(lines[end]):
            break
        end += 1
    text = " ".join(line.strip() for line in lines[start:end])
    if end < len(lines) and lines[end].strip() and _indent(lines[end]) > indent:
        if _BULLET.match(lines[end]):
            return end, [Block("text", (text,))]
        # A definition list, or text set off by its indent: its term is not a sentence.
        return _end_of_indented(lines, end, indent), [Block("lost", ())]
    if text.endswith("::"):
        return _end_of_indented(lines, end, indent), [Block("text", (text[:-1],)), Block("lost", ())]
    return end, [Block("text", (text,))]


_MATH_ROLE = re.compile(r":math:`([^`]*)`")
_NUMBER_ROLE = re.compile(r":(?:doi|arxiv|issue|gh|pr|user|cite|footcite|eq|numref):`[^`]*`")
_PEP_ROLE = re.compile(r":pep:`(\d+)`")
_PROSE_ROLE = re.compile(r":(?:term|ref|doc|any):`([^`<]+?)\s*(?:<[^`>]*>)?`")
_ANY_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`([^`]*)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_NAMED_LINK = re.compile(r"`([^`]+)`__?(?!\w)")
_CITATION = re.compile(r"\s*\[(?:\d+|[A-Z][\w+-]*\d{2,4}\w?|[A-Z]{1,4}\d*|CIT\w+|[Rr][\w-]+)\]_(?!\w)")
_LEANING_CITATION = re.compile(
    r"(?:\b(?:in|of|from|by|see|and|to|at|with|or|per|also|reference|references|refs?\.?|eq\.?|"
    r"following|section|chapter|table|theorem|equation|algorithm)|\(|,)\s*(?:\[[^\]\s]+\]_)",
    re.IGNORECASE,
)
# Not [0] or [0, 1], which are values.
_PLAIN_CITATION = re.compile(r"\s\[[1-9]\d?\](?!_?\w)")
_URL = re.compile(r"(?:https?|ftp)://\S+|www\.\S+")
_STRONG = re.compile(r"(?<![\w*`])\*\*([^\s*](?:[^*`]*[^\s*])?)\*\*(?![\w*])")
_EMPHASIS = re.compile(r"(?<![\w*`/(])\*([^\s*](?:[^*`]*[^\s*])?)\*(?![\w*])")


def _math(match: re.Match[str]) -> str:
    formula = match.group(1).strip()
    return LOST if not formula or "\\" in formula else f"`{formula}`"


def _prose_role(match: re.Match[str]) -> str:
    # A reference without a title shows its label, which is no prose.
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
    """Plain text of one paragraph: code in single ticks, no other markup.

    `LOST` marks what was removed and is missed in its sentence.
    """
    text = " ".join(text.split())
    text = text.replace("\\ ", "").replace("``", "`").replace("’", "'").replace("“", '"')
    text = text.replace("”", '"').replace("–", "-").replace("—", " - ")
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
    # An aside that only points elsewhere is not missed.
    text = re.sub(r"\s*\((?:see|cf\.?|refer to)\b[^()]*\)", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\s+([.,;:)])(?=\s|$)", r"\1", text)
    return " ".join(text.split())


def _unmark_prose(text: str) -> str:
    text = _LEANING_CITATION.sub(LOST, text)
    text = _CITATION.sub("", text)
    text = _PLAIN_CITATION.sub("", text)
    text = _STRONG.sub(r"\1", text)
    text = _EMPHASIS.sub(r"\1", text)
    return text.replace("\\*", "*").replace("\\_", "_").replace("\\|", "|")


_ABBREVIATION = re.compile(
    r"(?:\b(?i:e\.g|i\.e|etc|vs|cf|eq|eqs|fig|ref|refs|resp|approx|al|a\.k\.a|aka|w\.r\.t|dim|no"
    r"|sec|ch|pp|ed|vol|dr|st)|(?<![\w'])[A-Z])\.$"
)


def split_sentences(text: str) -> list[str]:
    """Sentences of a cleaned paragraph; dots inside code, brackets and abbreviations do not end one."""
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
            starts_next = re.match(r"[\"']?\s+(?:[\"'(]?[A-Z0-9`\"']|(?:scipy|numpy|sklearn)\b)", after)
            if not starts_next or _ABBREVIATION.search(text[start : i + 1]):
                continue
            sentences.append(text[start : i + 1].strip())
            start = i + 1
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


# Sentences that only point elsewhere: the text around them is whole without them.
_POINTER = re.compile(
    r"^(?:\(?(?:read more|see|see also|refer to|please see|please refer|for more|for further|"
    r"for (?:a |an |the )?(?:\w+ )*(?:examples?|comparisons?|details?|discussion|description|"
    r"explanation|information|introduction|list|overview|demonstration|definition)|for usage|"
    r"more (?:details|information)|an example|a detailed example|details (?:can|are)|"
    r"the documentation|cf\.|compare|optional\.$|new in|added in|changed in)\b)",
    re.IGNORECASE,
)
_LEANS_ELSEWHERE = re.compile(
    r"\b(?:below|above|earlier|previous(?:ly)? (?:section|mentioned|described)|user guide|"
    r"glossary|docstring|documentation|tutorial|deprecated|deprecation|backwards? compatib|"
    r"in version|since version|removed in|will be removed|example below|this example|notes? section|"
    r"in the notes|see notes?|section|eqs?\.|equation|figure|fig\.|table [0-9]|"
    r"the following|as follows|following (?:are|is|options|values|keys|attributes)|"
    r"see also|[,;] see|examples? (?:for|of|are|in)|the examples?|references?\)|"
    r"see (?:the|`|here|for)|refer to|refs?\.|for (?:more )?details|described (?:in|by) \[|"
    r"the paper|this page|todo|fixme|xxx|v?0\.\d+\.\d+)(?!\w)|(?:numpy|scipy|scikit-learn) v?\d|"
    r"::|>>>|[,;] see\b|(?:first|second|last) example|\|\||__\w+__ *=|\\",
    re.IGNORECASE,
)  # fmt: skip


def _is_balanced(text: str) -> bool:
    prose = re.sub(r"`[^`]*`", "", text)
    # Half-open intervals such as [0, 1) are balanced only when both kinds count as one.
    opened = sum(prose.count(bracket) for bracket in "([{")
    closed = sum(prose.count(bracket) for bracket in ")]}")
    return text.count("`") % 2 == 0 and opened == closed and prose.count('"') % 2 == 0


def is_clean(sentence: str) -> bool:
    """Whether a sentence stands alone: nothing lost, unbalanced or pointing elsewhere."""
    return (
        LOST not in sentence
        and _is_balanced(sentence)
        and not _LEANS_ELSEWHERE.search(re.sub(r"`[^`]*`", "`x`", sentence))
        and not re.search(r"\.\.(?!\.)(?<!\.\.\.)|:[a-z]+:`|``|\]_|`_", sentence)
        and not sentence.rstrip(".").endswith((",", ";", "-", "(", " and", " or"))
        # A full stop before a small letter is a sentence end that was mistyped, or a broken line.
        and not re.search(r"(?<!\.[a-z])(?<!etc)(?<!vs)(?<!resp)(?<!approx)(?<!al)\. [a-z]", sentence)
        and not re.search(r"\b(the|a|an|is|of|to|in|and) \1\b", sentence)
        and not re.search(r"\b(?:I|me|my)\b(?!\.|-)", re.sub(r"`[^`]*`", "", sentence))
    )


# Heads that announce a list and say nothing without it.
_ANNOUNCES = re.compile(
    r"(?:\b(?:following|one of|any of|options?|are|is|be|either|by|values?|includes?|such as|as|of|"
    r"can|supported|available|possible|valid|choices|two|three|if|when|then|that|where|with|to|"
    r"keys?|fields?|attributes?|follows|example|e\.g\.|i\.e\.|form|signature|default|"
    r"methods?|modes?|strings?|arguments?|parameters?))\s*:$",
    re.IGNORECASE,
)


def _join_items(items: Sequence[str]) -> str | None:
    """A short list as one run of clauses, or None if it does not read as one."""
    cleaned = []
    for item in items:
        text = clean_inline(item)
        if len(split_sentences(text)) != 1 or len(text) > MAX_ITEM_CHARACTERS:
            return None
        text = re.sub(r"[.,;]*(?:\s+(?:and|or))?$", "", text).rstrip(".,;")
        if not text or text.endswith(":") or not is_clean(text):
            return None
        cleaned.append(text)
    return "; ".join(cleaned) + "." if 2 <= len(cleaned) <= 7 else None


def usable_sentences(lines: Sequence[str], max_characters: int = MAX_CHARACTERS) -> list[str]:
    """The leading sentences of a section that are clean, at most `MAX_SENTENCES` of them.

    Reading stops at the first sentence or block that is not clean, because what follows may
    depend on it. Sentences that merely point elsewhere are skipped.
    """
    kept: list[str] = []
    total = 0
    blocks = split_blocks(lines)
    for position, block in enumerate(blocks):
        if block.kind != "text":
            break
        sentences = split_sentences(clean_inline(block.parts[0]))
        for number, raw in enumerate(sentences):
            sentence = raw
            if _POINTER.match(sentence):
                if sentence.endswith(":"):
                    return kept
                continue
            last = number == len(sentences) - 1
            announced = last and sentence.endswith(":")
            if announced:
                following = blocks[position + 1] if position + 1 < len(blocks) else None
                joined = (
                    _join_items(following.parts) if following and following.kind == "items" else None
                )
                if joined and total + len(sentence) + len(joined) <= max_characters:
                    sentence = f"{sentence} {joined}"
                    without_list = re.sub(r"following ", "", sentence)
                    return [*kept, sentence] if is_clean(without_list) else kept
                if kept or _ANNOUNCES.search(sentence):
                    return kept
                sentence = sentence[:-1] + "."
            elif last and (sentence[-1:].isalnum() or sentence[-1:] in "`)"):
                if position + 1 < len(blocks) and blocks[position + 1].kind != "text":
                    return kept  # it went on into a formula or a list
                sentence += "."
            if not is_clean(sentence) or not sentence.endswith((".", "!", '."', ".'")):
                return kept
            if kept and total + len(sentence) > max_characters:
                return kept
            kept.append(sentence)
            total += len(sentence) + 1
            if announced or len(kept) == MAX_SENTENCES:
                return kept
    return kept
