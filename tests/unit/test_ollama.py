"""The training template as an Ollama template."""

from __future__ import annotations

import pytest

from slm_lora.data.templates import Template
from slm_lora.export.ollama import go_template, modelfile

from ..support.tiny_model import CHAT_TEMPLATE

TOKENS = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
CHATML = (
    '{{ range .Messages }}{{ "<|im_start|>" }}{{ .Role }}{{ "\\n" }}{{ .Content }}'
    '{{ "<|im_end|>\\n" }}{{ end }}{{ "<|im_start|>assistant\\n" }}'
)


def test_instruction_response_template_becomes_a_go_template() -> None:
    assert go_template(Template("instruction_response"), None, {"eos_token": "</s>"}) == (
        '{{ range .Messages }}{{ if eq .Role "user" }}{{ "Instruction:\\n" }}{{ .Content }}'
        '{{ "\\nResponse:\\n" }}{{ else if eq .Role "assistant" }}{{ .Content }}{{ "</s>" }}'
        "{{ end }}{{ end }}"
    )


@pytest.mark.parametrize("kind", ["chat", "jinja"])
def test_chatml_is_recognised_by_its_output(kind: str) -> None:
    template = Template(kind)  # type: ignore[arg-type]
    assert go_template(template, CHAT_TEMPLATE, TOKENS) == CHATML
    respelt = CHAT_TEMPLATE.replace("message['role'] +", "message.role ~")
    assert go_template(template, respelt, TOKENS) == CHATML


def test_a_default_system_turn_is_kept() -> None:
    default_system = (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nBe \"kind\".<|im_end|>\\n' }}{% endif %}"
    )
    assert go_template(Template("chat"), default_system + CHAT_TEMPLATE, TOKENS) == (
        '{{ if ne (index .Messages 0).Role "system" }}'
        '{{ "<|im_start|>system\\nBe \\"kind\\".<|im_end|>\\n" }}{{ end }}' + CHATML
    )


@pytest.mark.parametrize(
    "chat",
    [
        "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
        CHAT_TEMPLATE + "{{ '<think>' }}",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + CHAT_TEMPLATE,
    ],
)
def test_unknown_templates_are_not_converted(chat: str) -> None:
    assert go_template(Template("chat"), chat, TOKENS) is None
    text = modelfile("it.gguf", None, Template("chat"), chat, TOKENS)
    assert text.startswith("FROM ./it.gguf\n# No TEMPLATE")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
