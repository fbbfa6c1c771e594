"""Split a docstring section into paragraphs and lists."""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Block(NamedTuple):
    """One paragraph or list; `kind` is "text", "items" or "lost" (removed content)."""

    kind: str
    parts: tuple[str, ...]


# Self-contained directives: the text around them is complete without them.
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
    """Return the index of the next line that is not blank and not indented beyond `indent`."""
    end = start
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
        end += 1
    return end


def split_blocks(lines: Sequence[str]) -> list[Block]:
    """Return the paragraphs and lists of a docstring section; directives and code are removed."""
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
            i, paragraph = _read_paragraph(lines, i)
            blocks.extend(paragraph)
    return blocks


def _read_items(lines: Sequence[str], start: int) -> tuple[int, Block]:
    indent = _indent(lines[start])
    items: list[str] = []
    complete = True
    i = start
    while i < len(lines):
        line = lines[i]
        bullet = _BULLET.match(line)
        if not line.strip():
            # A blank line ends the list unless another item or more of this one follows.
            following = next((text for text in lines[i:] if text.strip()), "")
            if not (_BULLET.match(following) or _indent(following) > indent):
                break
            if not _BULLET.match(following) or _indent(following) != indent:
                complete = False
        elif bullet and _indent(line) == indent:
            items.append(line[bullet.end() :].strip())
        elif _indent(line) > indent:
            complete = complete and not bullet and not _DIRECTIVE.match(line)
            items[-1] += " " + line.strip()
        else:
            break
        i += 1
    return i, Block("items", tuple(items)) if complete else Block("lost", ())


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
        # A definition list or indented text: its term is not a sentence.
        return _end_of_indented(lines, end, indent), [Block("lost", ())]
    if text.endswith("::"):
        return _end_of_indented(lines, end, indent), [
            Block("text", (text[:-1],)),
            Block("lost", ()),
        ]
    return end, [Block("text", (text,))]
