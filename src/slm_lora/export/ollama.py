"""Ollama's Modelfile with the training template.

Templates use Go's syntax. Literal text is written as quoted strings, which preserve line ends.
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
    chat_template: str | None,
    tokens: Mapping[str, str],
) -> str:
    """The text of a Modelfile.

    Args:
        model: file name of the GGUF model.
        adapter: file name of the GGUF adapter, if any.
        template: the training template.
        chat_template: the training template as a chat template.
        tokens: special tokens of the tokenizer by name (``eos_token`` …).
    """
    lines = [f"FROM ./{model}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    ollama_template = go_template(template, chat_template, tokens)
    if ollama_template is None:
        lines.append(
            "# No TEMPLATE: the training template could not be converted to Go's syntax. Add it "
            "before use; otherwise prompts differ from those of the training."
        )
    else:
        lines.append(f'TEMPLATE """{ollama_template}"""')
    if eos := tokens.get("eos_token"):
        lines.append(f"PARAMETER stop {json.dumps(eos, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def go_template(
    template: Template, chat_template: str | None, tokens: Mapping[str, str]
) -> str | None:
    """Convert the training template to Go's syntax; None if it is neither built in nor ChatML.

    BOS is omitted: Ollama's runner adds it, as the tokenizer does.
    """
    eos = tokens.get("eos_token", "")
    if template.kind == "plain":
        return _role_template({"user": ("", ""), "assistant": ("", eos)})
    if template.kind == "instruction_response":
        return _role_template({"user": ("Instruction:\n", "\nResponse:\n"), "assistant": ("", eos)})
    return _chatml(chat_template, tokens) if chat_template is not None else None


def _role_template(delimiters: Mapping[str, tuple[str, str]]) -> str:
    parts: list[str] = []
    for role, (before, after) in delimiters.items():
        keyword = "else if" if parts else "if"
        turn = f"{_go_string(before)}{{{{ .Content }}}}{_go_string(after)}"
        parts.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{turn}')
    return f"{{{{ range .Messages }}}}{''.join(parts)}{{{{ end }}}}{{{{ end }}}}"


def _go_string(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _chatml(chat_template: str, tokens: Mapping[str, str]) -> str | None:
    """ChatML, with the default system turn of the template if it has one; else None.

    The template is recognised by the text it renders, not by its source.
    """
    try:
        render = jinja_renderer(chat_template, dict(tokens))
        rendered = render(_PROBES[0], True)
        user_start = rendered.rfind("<|im_start|>user\n")
        default_system = rendered[: max(user_start, 0)]
        expected = [
            ("" if probe[0]["role"] == "system" else default_system)
            + "".join(
                f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
                for message in probe
            )
            + "<|im_start|>assistant\n"
            for probe in _PROBES
        ]
        if [render(probe, True) for probe in _PROBES] != expected:
            return None
    except Exception:  # e.g. it rejects a system turn; a template may raise anything
        return None
    system = _go_string(default_system)
    if system:
        system = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{system}{{{{ end }}}}'
    turn = f"{_go_string('<|im_start|>')}{{{{ .Role }}}}{_go_string(chr(10))}{{{{ .Content }}}}"
    turn_end = _go_string("<|im_end|>\n")
    return (
        f"{system}{{{{ range .Messages }}}}{turn}{turn_end}{{{{ end }}}}"
        f"{_go_string('<|im_start|>assistant' + chr(10))}"
    )


def write_modelfile(folder: Path, text: str) -> None:
    """Write the Modelfile into the folder of the GGUF files, which it names by file name."""
    (folder / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
