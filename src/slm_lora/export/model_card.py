"""The model card of what is pushed: computed from the run, so that it says nothing else."""

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
from slm_lora.export.trained import Trained
from slm_lora.model.model_folder import CHAT_TEMPLATE
from slm_lora.runs.folder import METRICS_FILE, read_run, run_folders


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of a base or of data: its page on the hub, and its licence."""

    hub_id: str | None
    licence: str
    note: str


_BASES = {
    "smollm2-135m-instruct-q4_1": _Known(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
        "Apache-2.0. The weights that were trained on are those of a Q4_1 file, dequantised; "
        "`slm-lora models fetch` makes them",
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Known(None, "apache-2.0", "Apache-2.0"),
    "HuggingFaceTB/SmolLM2-135M": _Known(None, "apache-2.0", "Apache-2.0"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _Known(None, "apache-2.0", "Apache-2.0"),
}
_DATA = {
    "ml-qa": _Known(
        None,
        "bsd-3-clause",
        "questions and answers from the docstrings of scikit-learn, scipy and numpy "
        "(BSD-3-Clause), made by `slm-lora data build`",
    ),
    "databricks/databricks-dolly-15k": _Known(None, "cc-by-sa-3.0", "CC BY-SA 3.0, by Databricks"),
}
_UNKNOWN = _Known(None, "", "licence not known here; see its page")


def card(trained: Trained, repository: str, results: Path) -> str:
    """The text of README.md, with the hub's front matter.

    Args:
        trained: an adapter, or a whole model.
        repository: ``owner/name`` that it goes to.
        results: folder of experiments' results; losses are told where the run is found there.

    Raises:
        IntegrityError: the results are there, but broken.
    """
    base, data = _base(trained), _data(trained)
    parts = [
        f"---\n{yaml.safe_dump(_front(trained, base, data), sort_keys=False).strip()}\n---",
        f"# {repository.split('/')[-1]}",
        _what(trained),
        "## Trained on",
        f"- base: {_linked(trained.base_name, base)} ({base.note}). SHA-256 of its weights: "
        f"`{trained.about['base']['sha256']}`\n"
        f"- data: {_linked(_data_name(trained), data)} ({data.note})",
        "## How",
        _settings(trained),
        *_losses(trained, results),
        "## Use",
        _use(trained, repository),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(trained: Trained) -> _Known:
    return _BASES.get(trained.base_name, _UNKNOWN)


def _data_name(trained: Trained) -> str:
    return str(trained.about.get("recipe", {}).get("data", {}).get("name", "not recorded"))


def _data(trained: Trained) -> _Known:
    return _DATA.get(_data_name(trained), _UNKNOWN)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _linked(name: str, known: _Known) -> str:
    hub_id = known.hub_id or (name if _is_hub_id(name) else None)
    return f"`{name}`" + (f" of `{hub_id}`" if hub_id not in (None, name) else "")


def _front(trained: Trained, base: _Known, data: _Known) -> dict[str, Any]:
    """What the hub reads: only ids that exist there, and no licence that is not known."""
    hub_base = base.hub_id or (trained.base_name if _is_hub_id(trained.base_name) else None)
    # What must be shared alike is; an unknown licence of base or data leaves it open.
    known = bool(base.licence and data.licence)
    alike = [each for each in (base.licence, data.licence) if "-sa-" in each]
    front: dict[str, Any] = {}
    if hub_base is not None:
        front["base_model"] = hub_base
        front["base_model_relation"] = "finetune" if trained.whole else "adapter"
    front["library_name"] = "transformers" if trained.whole else "peft"
    front["pipeline_tag"] = "text-generation"
    front["license"] = (alike or [base.licence])[0] if known else "other"
    if _is_hub_id(_data_name(trained)):
        front["datasets"] = [_data_name(trained)]
    front["tags"] = ["slm-lora", *(["lora"] if METHODS[_kind(trained)].config else [])]
    return front


def _kind(trained: Trained) -> MethodName:
    kind = trained.about.get("recipe", {}).get("adapter", {}).get("kind", "lora")
    return kind if kind in METHODS else "lora"


def _what(trained: Trained) -> str:
    method = METHOD_LABELS[_kind(trained)]
    if merged := trained.about.get("merged"):
        proof = merged["proof"]
        share = proof["max_difference"] / proof["max_logit"]
        return (
            f"A {method} adapter merged into `{trained.base_name}`, in {merged['dtype']}. On "
            f"{proof['agree']} of {proof['prompts']} prompts its logits differ from base+adapter's "
            f"by at most {share:.1e} of the largest."
        )
    if trained.whole:
        return f"`{trained.base_name}` after training all weights."
    return f"A {method} adapter for `{trained.base_name}`, in PEFT's format."


_SHOWN: Mapping[str, Sequence[str]] = {
    "data": ("size", "max_length", "split_seed"),
    "adapter": ("kind", "r", "lora_alpha", "lora_dropout", "target_modules"),
    "training": (
        "num_train_epochs", "max_steps", "effective_batch_size", "loss_on", "learning_rate",
        "lr_scheduler_type", "warmup_ratio", "loraplus_lr_ratio", "weight_decay", "precision",
    ),
}  # fmt: skip


def _settings(trained: Trained) -> str:
    recipe = trained.about.get("recipe", {})
    rows = [
        f"| {section}.{key} | {_cell(recipe[section][key])} |"
        for section, keys in _SHOWN.items()
        for key in keys
        if recipe.get(section, {}).get(key) is not None
        and (section != "adapter" or key == "kind" or METHODS[_kind(trained)].config)
    ]
    rows += [f"| seed | {recipe['seed']} |"] if "seed" in recipe else []
    template = trained.template
    prompt = {
        "instruction_response": "`Instruction:\\n…\\nResponse:\\n`",
        "chat": "the base's own chat template",
        "plain": "the bare prompt",
        "jinja": "a template of its own",
    }[template.kind]
    table = "\n".join(["| key | value |", "| :-- | :-- |", *rows])
    chat = trained.chat_template
    if chat is None:
        where = "no chat template gives other programs the same tokens."
    elif has_frozen_date(chat) and chat != read_template(trained.folder / CHAT_TEMPLATE):
        # As earlier versions wrote it.
        where = (
            "`chat_template.jinja` holds it, but for the date: it writes today's, training wrote "
            f"{TEMPLATE_DATE:%d %b %Y}."
        )
    elif has_frozen_date(chat):
        where = f"`chat_template.jinja` holds it, with {TEMPLATE_DATE:%d %b %Y} as today's date."
    else:
        where = "`chat_template.jinja` holds it."
    return f"{table}\n\nPrompted with {prompt}; {where} `slm_lora.json` holds the whole recipe."


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else f"{value}"


def _losses(trained: Trained, results: Path) -> list[str]:
    """Held-out losses of this run and of its base, from the last table of the experiment; from
    the runs, without intervals, where that is of others."""
    experiment = str(trained.about.get("experiment", ""))
    path = results / experiment / METRICS_FILE
    if not experiment or not path.is_file():
        return []
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        mine = [run for run in runs if run["hash"] == trained.about.get("run")]
        if not mine:
            # The last table may be of other runs that lie there: what is known without it.
            runs = [dict(read_run(folder).raw) for folder in run_folders(path.parent / "runs")]
            mine = [run for run in runs if run["hash"] == trained.about.get("run")]
        if not mine:
            return []
        headline = mine[0]["evaluation"]["headline"]
        held_out = mine[0]["data"]["held_out_sha256"]
        base = [
            run
            for run in runs
            if run["cell"] == "base"
            and run["data"]["held_out_sha256"] == held_out
            and run["model"]["sha256"] == mine[0]["model"]["sha256"]
        ]
        rows = [
            _loss_row(label, run, headline)
            for label, run in [*(("base", run) for run in base[:1]), ("this", mine[0])]
        ]
        count = mine[0]["evaluation"][headline]["rows"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise IntegrityError(f"{path}: broken ({error}); make it again: slm-lora report") from error
    what = {"all": "the whole text", "response": "the response alone"}[headline]
    return [
        "## Held-out loss",
        "\n".join(
            [
                "| model | loss (nats a token) | 95 % interval | perplexity |",
                "| :-- | --: | --: | --: |",
                *rows,
            ]
        ),
        f"On {count} test rows that no training saw, over the tokens of {what}. The intervals "
        "cover the choice of test rows, not of seeds; the rows are the same, so the difference "
        "is known better than the two intervals suggest.",
    ]


def _loss_row(label: str, run: Mapping[str, Any], headline: str) -> str:
    if "intervals" not in run:
        found = run["evaluation"][headline]
        return f"| {label} | {found['loss']:.4f} | – | {found['perplexity']:.3f} |"
    found = run["intervals"][headline]
    return (
        f"| {label} | {found['value']:.4f} | {found['low']:.4f} – {found['high']:.4f} "
        f"| {math.exp(found['value']):.3f} |"
    )


def _use(trained: Trained, repository: str) -> str:
    name = repository.split("/")[-1]
    local = not _is_hub_id(trained.base_name) and trained.base_name not in _BASES
    if trained.base_name == "smollm2-135m-instruct-q4_1":
        base = "$(slm-lora models fetch)"
    else:
        base = f"path/to/{trained.base_name}" if local else trained.base_name
    fetch = f"hf download {repository} --local-dir {name}"
    if not trained.whole:
        fetch += f"\nexport BASE={base}"
    export = f"slm-lora export gguf {name} {name}-gguf"
    separate = not trained.whole and METHODS[_kind(trained)].loads_as_lora
    place = ' --base "$BASE"' if local and not trained.whole else ""
    export += f"{' --as adapter' if separate else ''}{place}"
    base_file = trained.base_name.rsplit("/", 1)[-1]
    model = f"{base_file}-f16.gguf --lora {name}-gguf/{name}-lora.gguf"
    served = model if separate else f"{name}-f16.gguf"
    return "\n\n".join(
        [
            _commands("", fetch),
            _commands("transformers" if trained.whole else "PEFT", _python(trained, name)),
            _commands("vLLM", _vllm(trained, name, place)),
            _commands(
                "llama.cpp (bases of the Llama family)",
                f"{export}\nllama-server --jinja -m {name}-gguf/{served}",
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


def _python(trained: Trained, name: str) -> str:
    load = (
        f'model = AutoModelForCausalLM.from_pretrained("{name}")'
        if trained.whole
        else 'model = AutoModelForCausalLM.from_pretrained(os.environ["BASE"])\n'
        f'model = PeftModel.from_pretrained(model, "{name}")'
    )
    where = f'"{name}"' if trained.whole else 'os.environ["BASE"]'
    head = "" if trained.whole else "import os\nfrom peft import PeftModel\n"
    # The adapter's folder has no tokenizer; its template is not the base's.
    template = (
        ""
        if trained.whole or trained.chat_template is None
        else f'tokenizer.chat_template = open("{name}/chat_template.jinja").read()\n'
    )
    return (
        f"python - <<'END'\n{head}from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{load}\ntokenizer = AutoTokenizer.from_pretrained({where})\n{template}"
        'messages = [{"role": "user", "content": "What is a bridge?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)\n'
        "found = model.generate(**inputs, max_new_tokens=100)\n"
        'print(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], '
        "skip_special_tokens=True))\nEND"
    )


def _vllm(trained: Trained, name: str, place: str) -> str:
    template = (
        f" --chat-template {name}/chat_template.jinja" if trained.chat_template is not None else ""
    )
    if trained.whole:
        return f"vllm serve {name}{template}"
    if not METHODS[_kind(trained)].loads_as_lora:
        return f"slm-lora merge {name} {name}-merged{place}\nvllm serve {name}-merged{template}"
    rank = max(8, 2 ** math.ceil(math.log2(int(trained.adapter_config()["r"]))))
    return (
        f'vllm serve "$BASE" --enable-lora --max-lora-rank {rank} '
        f"--lora-modules {name}={name}{template}"
    )
