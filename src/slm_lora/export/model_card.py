"""The model card of a pushed folder, computed from its run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from slm_lora.adapters.methods import METHODS
from slm_lora.config.types import METHOD_LABELS, MethodName
from slm_lora.data.chat_templates import TEMPLATE_DATE, has_frozen_date, read_template
from slm_lora.errors import IntegrityError
from slm_lora.export.trained import TrainedFolder
from slm_lora.model.model_folder import CHAT_TEMPLATE
from slm_lora.runs.folder import METRICS_FILE, read_run, run_folders


@dataclass(frozen=True, slots=True)
class _Origin:
    """Hub page and licence of a base or a data set."""

    hub_id: str | None
    licence: str
    note: str


_BASES = {
    "smollm2-135m-instruct-q4_1": _Origin(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "Apache-2.0. The training used the weights of a Q4_1 file, dequantised; "
        "`slm-lora models fetch` creates them",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Origin(None, "apache-2.0", "Apache-2.0"),
    "HuggingFaceTB/SmolLM2-135M": _Origin(None, "apache-2.0", "Apache-2.0"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _Origin(None, "apache-2.0", "Apache-2.0"),
}
_DATA = {
    "ml-qa": _Origin(
        None,
        "bsd-3-clause",
        "questions and answers from the docstrings of scikit-learn, scipy and numpy "
        "(BSD-3-Clause), built by `slm-lora data build`",
    ),
    "databricks/databricks-dolly-15k": _Origin(None, "cc-by-sa-3.0", "CC BY-SA 3.0, by Databricks"),
}
_UNKNOWN_ORIGIN = _Origin(None, "", "licence unknown; see its page")


def card(trained: TrainedFolder, repository: str, results: Path) -> str:
    """Text of README.md with the hub's front matter.

    Args:
        trained: an adapter or a full model.
        repository: ``owner/name`` of the target.
        results: results folder; the card has losses if the run is found there.

    Raises:
        IntegrityError: the results of the experiment cannot be read.
    """
    base, data = _base(trained), _data(trained)
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(trained, base, data), sort_keys=False).strip()}\n---",
        f"# {repository.split('/')[-1]}",
        _summary(trained),
        "## Trained on",
        f"- base: {_name_with_hub_id(trained.base_name, base)} ({base.note}). "
        f"SHA-256 of its weights: `{trained.metadata['base']['sha256']}`\n"
        f"- data: {_name_with_hub_id(_data_name(trained), data)} ({data.note})",
        "## Settings",
        _settings(trained),
        *_losses(trained, results),
        "## Use",
        _use(trained, repository),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(trained: TrainedFolder) -> _Origin:
    return _BASES.get(trained.base_name, _UNKNOWN_ORIGIN)


def _data_name(trained: TrainedFolder) -> str:
    return str(trained.metadata.get("recipe", {}).get("data", {}).get("name", "not recorded"))


def _data(trained: TrainedFolder) -> _Origin:
    return _DATA.get(_data_name(trained), _UNKNOWN_ORIGIN)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _name_with_hub_id(name: str, origin: _Origin) -> str:
    hub_id = origin.hub_id or (name if _is_hub_id(name) else None)
    return f"`{name}`" + (f" of `{hub_id}`" if hub_id not in (None, name) else "")


def _front_matter(trained: TrainedFolder, base: _Origin, data: _Origin) -> dict[str, Any]:
    """Metadata for the hub: only ids that exist there, and only known licences."""
    hub_base = base.hub_id or (trained.base_name if _is_hub_id(trained.base_name) else None)
    # Share-alike licences take precedence; with an unknown licence the result is "other".
    licences_known = bool(base.licence and data.licence)
    share_alike = [licence for licence in (base.licence, data.licence) if "-sa-" in licence]
    front: dict[str, Any] = {}
    if hub_base is not None:
        front["base_model"] = hub_base
        front["base_model_relation"] = "finetune" if trained.is_full_model else "adapter"
    front["library_name"] = "transformers" if trained.is_full_model else "peft"
    front["pipeline_tag"] = "text-generation"
    front["license"] = (share_alike or [base.licence])[0] if licences_known else "other"
    if _is_hub_id(_data_name(trained)):
        front["datasets"] = [_data_name(trained)]
    front["tags"] = ["slm-lora", *(["lora"] if METHODS[_method(trained)].config else [])]
    return front


def _method(trained: TrainedFolder) -> MethodName:
    name = trained.metadata.get("recipe", {}).get("adapter", {}).get("kind", "lora")
    return name if name in METHODS else "lora"


def _summary(trained: TrainedFolder) -> str:
    method = METHOD_LABELS[_method(trained)]
    if merged := trained.metadata.get("merged"):
        proof = merged["proof"]
        relative = proof["max_difference"] / proof["max_logit"]
        return (
            f"A {method} adapter merged into `{trained.base_name}`, in {merged['dtype']}. On "
            f"{proof['agree']} of {proof['prompts']} prompts its logits differ from base+adapter's "
            f"by at most {relative:.1e} of the largest."
        )
    if trained.is_full_model:
        return f"`{trained.base_name}`, fully fine-tuned."
    return f"A {method} adapter for `{trained.base_name}`, in PEFT's format."


_SHOWN_KEYS: Mapping[str, Sequence[str]] = {
    "data": ("size", "max_length", "split_seed"),
    "adapter": ("kind", "r", "lora_alpha", "lora_dropout", "target_modules"),
    "training": (
        "num_train_epochs", "max_steps", "effective_batch_size", "loss_on", "learning_rate",
        "lr_scheduler_type", "warmup_ratio", "loraplus_lr_ratio", "weight_decay", "precision",
    ),
}  # fmt: skip


def _settings(trained: TrainedFolder) -> str:
    recipe = trained.metadata.get("recipe", {})
    rows = [
        f"| {section}.{key} | {_cell(recipe[section][key])} |"
        for section, keys in _SHOWN_KEYS.items()
        for key in keys
        if recipe.get(section, {}).get(key) is not None
        and (section != "adapter" or key == "kind" or METHODS[_method(trained)].config)
    ]
    rows += [f"| seed | {recipe['seed']} |"] if "seed" in recipe else []
    template = trained.template
    prompt = {
        "instruction_response": "`Instruction:\\n…\\nResponse:\\n`",
        "chat": "the chat template of the base",
        "plain": "the bare prompt",
        "jinja": "a custom template",
    }[template.kind]
    table = "\n".join(["| key | value |", "| :-- | :-- |", *rows])
    chat = trained.chat_template
    if chat is None:
        note = "no chat template gives other programs the same tokens."
    elif has_frozen_date(chat) and chat != read_template(trained.folder / CHAT_TEMPLATE):
        # Earlier versions wrote the template unchanged.
        note = (
            "`chat_template.jinja` holds it, except for the date: it inserts today's, training "
            f"used {TEMPLATE_DATE:%d %b %Y}."
        )
    elif has_frozen_date(chat):
        note = f"`chat_template.jinja` holds it, with {TEMPLATE_DATE:%d %b %Y} as today's date."
    else:
        note = "`chat_template.jinja` holds it."
    return f"{table}\n\nPrompted with {prompt}; {note} `slm_lora.json` holds the whole recipe."


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _losses(trained: TrainedFolder, results: Path) -> list[str]:
    """Held-out losses of this run and its base, from metrics.json of the experiment; if that lacks
    the run, from the run folders, without intervals."""
    experiment = str(trained.metadata.get("experiment", ""))
    path = results / experiment / METRICS_FILE
    if not experiment or not path.is_file():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        matches = [run for run in runs if run["hash"] == trained.metadata.get("run")]
        if not matches:
            # metrics.json may cover other runs; fall back to the run folders.
            runs = [dict(read_run(folder).raw) for folder in run_folders(path.parent / "runs")]
            matches = [run for run in runs if run["hash"] == trained.metadata.get("run")]
        if not matches:
            return []
        headline = matches[0]["evaluation"]["headline"]
        held_out = matches[0]["data"]["held_out_sha256"]
        base = [
            run
            for run in runs
            if run["cell"] == "base"
            and run["data"]["held_out_sha256"] == held_out
            and run["model"]["sha256"] == matches[0]["model"]["sha256"]
        ]
        rows = [
            _loss_row(label, run, headline)
            for label, run in [*(("base", run) for run in base[:1]), ("this", matches[0])]
        ]
        count = matches[0]["evaluation"][headline]["rows"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error}); write it again: slm-lora report"
        ) from error
    scope = {"all": "the whole text", "response": "the response"}[headline]
    return [
        "## Held-out loss",
        "\n".join(
            [
                "| model | loss (nats per token) | 95 % interval | perplexity |",
                "| :-- | --: | --: | --: |",
                *rows,
            ]
        ),
        f"On {count} held-out rows, over the tokens of {scope}. The intervals cover the choice of "
        "test rows, not of seeds. Both models are scored on the same rows, so their difference is "
        "more precise than the two intervals suggest.",
    ]


def _loss_row(label: str, run: Mapping[str, Any], headline: str) -> str:
    if "intervals" not in run:
        loss = run["evaluation"][headline]
        return f"| {label} | {loss['loss']:.4f} | – | {loss['perplexity']:.3f} |"
    loss = run["intervals"][headline]
    return (
        f"| {label} | {loss['value']:.4f} | {loss['low']:.4f} – {loss['high']:.4f} "
        f"| {math.exp(loss['value']):.3f} |"
    )


def _use(trained: TrainedFolder, repository: str) -> str:
    name = repository.split("/")[-1]
    has_local_base = not _is_hub_id(trained.base_name) and trained.base_name not in _BASES
    if trained.base_name == "smollm2-135m-instruct-q4_1":
        base = "$(slm-lora models fetch)"
    else:
        base = f"path/to/{trained.base_name}" if has_local_base else trained.base_name
    fetch = f"hf download {repository} --local-dir {name}"
    if not trained.is_full_model:
        fetch += f"\nexport BASE={base}"
    export = f"slm-lora export gguf {name} {name}-gguf"
    as_adapter = not trained.is_full_model and METHODS[_method(trained)].loads_as_lora
    base_option = ' --base "$BASE"' if has_local_base and not trained.is_full_model else ""
    export += f"{' --as adapter' if as_adapter else ''}{base_option}"
    base_file = trained.base_name.rsplit("/", 1)[-1]
    base_arguments = f"{base_file}-f16.gguf --lora {name}-gguf/{name}-lora.gguf"
    model_arguments = base_arguments if as_adapter else f"{name}-f16.gguf"
    return "\n\n".join(
        [
            _commands("", fetch),
            _commands("transformers" if trained.is_full_model else "PEFT", _python(trained, name)),
            _commands("vLLM", _vllm(trained, name, base_option)),
            _commands(
                "llama.cpp (bases of the Llama family)",
                f"{export}\nllama-server --jinja -m {name}-gguf/{model_arguments}",
            ),
            _commands(
                "Ollama, from the same files",
                f"cd {name}-gguf && ollama create {name} -f Modelfile && ollama run {name}",
            ),
        ]
    )


def _commands(title: str, text: str) -> str:
    block = f"```\n{text}\n```"
    return f"{title}:\n\n{block}" if title else block


def _python(trained: TrainedFolder, name: str) -> str:
    load = (
        f'model = AutoModelForCausalLM.from_pretrained("{name}")'
        if trained.is_full_model
        else 'model = AutoModelForCausalLM.from_pretrained(os.environ["BASE"])\n'
        f'model = PeftModel.from_pretrained(model, "{name}")'
    )
    tokenizer_source = f'"{name}"' if trained.is_full_model else 'os.environ["BASE"]'
    imports = "" if trained.is_full_model else "import os\nfrom peft import PeftModel\n"
    # An adapter folder has no tokenizer, and its template may differ from the base's.
    template = (
        ""
        if trained.is_full_model or trained.chat_template is None
        else f'tokenizer.chat_template = open("{name}/chat_template.jinja").read()\n'
    )
    return (
        f"python - <<'END'\n{imports}from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{load}\ntokenizer = AutoTokenizer.from_pretrained({tokenizer_source})\n{template}"
        'messages = [{"role": "user", "content": "What is a bridge?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "output = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], '
        "skip_special_tokens=True))\nEND"
    )


def _vllm(trained: TrainedFolder, name: str, base_option: str) -> str:
    template = (
        f" --chat-template {name}/chat_template.jinja" if trained.chat_template is not None else ""
    )
    if trained.is_full_model:
        return f"vllm serve {name}{template}"
    if not METHODS[_method(trained)].loads_as_lora:
        return (
            f"slm-lora merge {name} {name}-merged{base_option}\nvllm serve {name}-merged{template}"
        )
    rank = max(8, 2 ** math.ceil(math.log2(int(trained.adapter_config()["r"]))))
    return (
        f'vllm serve "$BASE" --enable-lora --max-lora-rank {rank} '
        f"--lora-modules {name}={name}{template}"
    )
