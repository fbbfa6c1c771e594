"""A Modelfile, so that Ollama prompts as was trained.

Its templates are Go's: what they say is written with strings in quotes, as Go and JSON have them,
so that no line end is lost or won.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from slm_lora.data.chat_templates import jinja_renderer
from slm_lora.data.templates import Template

_PROBES = (
    [{"role": "user", "content": "one"}],
    [{"role": "system", "content": "two"}, {"role": "user", "content": "three"}],
    [
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five"},
        {"role": "user", "content": "six"},
    ],
)


def modelfile(
    model: str,
    adapter: str | None,
    template: Template,
    chat: str | None,
    tokens: Mapping[str, str],
) -> str:
    """The text of a Modelfile.

    Args:
        model: file name of the GGUF model.
        adapter: file name of the GGUF adapter on it, if there is one.
        template: the training template.
        chat: the same as a chat template.
        tokens: the tokenizer's special tokens by name (``eos_token`` …).
    """
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    written = go_template(template, chat, tokens)
    if written is None:
        lines.append(
            "# No TEMPLATE: the training template is not one that is known here in Go's syntax. "
            "Write it before use: Ollama would prompt otherwise than was trained."
        )
    else:
        lines.append(f'TEMPLATE """{written}"""')
    if eos := tokens.get("eos_token"):
        lines.append(f"PARAMETER stop {json.dumps(eos, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def go_template(template: Template, chat: str | None, tokens: Mapping[str, str]) -> str | None:
    """The training template in Go's syntax, or None where it is not known how to write it.

    BOS is left out: Ollama's runner adds it as the tokenizer does.
    """
    eos = tokens.get("eos_token", "")
    if template.kind == "plain":
        return _turns({"user": ("", ""), "assistant": ("", eos)})
    if template.kind == "instruction_response":
        return _turns({"user": ("Instruction:\n", "\nResponse:\n"), "assistant": ("", eos)})
    return _chatml(chat, tokens) if chat is not None else None


def _turns(around: Mapping[str, tuple[str, str]]) -> str:
    parts: list[str] = []
    for role, (before, after) in around.items():
        word = "else if" if parts else "if"
        parts.append(
            f'{{{{ {word} eq .Role "{role}" }}}}{_said(before)}{{{{ .Content }}}}{_said(after)}'
        )
    return f"{{{{ range .Messages }}}}{''.join(parts)}{{{{ end }}}}{{{{ end }}}}"


def _said(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _chatml(chat: str, tokens: Mapping[str, str]) -> str | None:
    """ChatML, with the system turn that the template writes by itself, if it does so.

    Known by what it renders, not by how it is written.
    """
    try:
        render = jinja_renderer(chat, dict(tokens))
        first = render(_PROBES[0], True)
        at = first.rfind("<|im_start|>user\n")
        own = first[: max(at, 0)]
        wanted = [
            ("" if probe[0]["role"] == "system" else own)
            + "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in probe)
            + "<|im_start|>assistant\n"
            for probe in _PROBES
        ]
        if [render(probe, True) for probe in _PROBES] != wanted:
            return None
    except Exception:  # it refuses a system turn; a program may fail in any way
        return None
    system = ""
    if own:
        system = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_said(own)}{{{{ end }}}}'
    turn = f"{_said('<|im_start|>')}{{{{ .Role }}}}{_said(chr(10))}{{{{ .Content }}}}"
    ends = _said("<|im_end|>\n")
    return (
        f"{system}{{{{ range .Messages }}}}{turn}{ends}{{{{ end }}}}"
        f"{_said('<|im_start|>assistant' + chr(10))}"
    )


def write_modelfile(folder: Path, text: str) -> None:
    """Put it beside the GGUF files, which it names without their folder."""
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
