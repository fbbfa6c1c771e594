"""Correctness for every model family: losses of small random models match transformers and PEFT.

Makes a small model of each family, runs the command on it (LoRA on all linear layers, four steps),
and recomputes the losses of base and adapter with transformers and PEFT alone, row by row without
padding. A family passes if losses agree to `BOUND` nats per token in fp32, or if it is refused
before any work, with the reason.

    make zoo                      all families; writes the table in docs/models.md
    make zoo ARGS='llama gpt2'    a selection; only prints
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOUND = 2e-6
"""Allowed difference in nats per token in fp32: rounding of sums in another order."""

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
WINDOWS: dict[str, Any] = {
    "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_d_ssm": 128, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {
    # Families with small models in common use.
    "llama": {},
    "mistral": {"sliding_window": None},
    "ministral": WINDOWS,
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "gemma": {},
    "gemma2": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma3_text": WINDOWS | {"query_pre_attn_scalar": 16},
    "gemma3n_text": WINDOWS | {
        "vocab_size_per_layer_input": 500, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [96, 96],
    },
    "gemma4_text": WINDOWS | {
        "vocab_size_per_layer_input": 500, "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0, "global_head_dim": 16,
    },
    "smollm3": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {"pad_token_id": None},
    "granite": {
        "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "attention_multiplier": 0.06,
    },
    "granitemoehybrid": MAMBA2 | EXPERTS | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32,
        "logits_scaling": 6.0,
    },
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "falcon_h1": MAMBA2 | {"lm_head_multiplier": 0.3},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": WINDOWS | {"logit_scale": 0.0625},
    "gpt_oss": WINDOWS | EXPERTS,
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "bloom": {},
    "starcoder2": {},
    "stablelm": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    # Others.
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
        "chunk_size": 16,
    },
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
                        "use_mamba_kernels": False, "mamba_dt_rank": 8},
    "zamba2": MAMBA2 | {"num_key_value_heads": 4, "n_mamba_heads": 8, "mamba_ngroups": 1,
                        "layer_types": ["mamba", "hybrid"], "attention_head_dim": 32},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64},
    "vaultgemma": WINDOWS | {"query_pre_attn_scalar": 16},
    "nanochat": {},
    "minicpm3": LATENT | {"head_dim": None},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1},
    "ernie4_5": {},
    "exaone4": WINDOWS,
    "seed_oss": {},
    "helium": {},
    "arcee": {},
    "apertus": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": 2},
    "dots1": LATENT | {"head_dim": 16, "num_key_value_heads": 2},
    "diffllama": {},
    "doge": {},
    "olmoe": EXPERTS,
    "flex_olmo": EXPERTS,
    "phimoe": EXPERTS,
    "granitemoe": EXPERTS,
    "jetmoe": {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen3_next": EXPERTS | {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "decoder_sparse_step": 1,
    },
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    "minimax": EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 32},
    "persimmon": {},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16, "num_layers": 2},
    "gpt_bigcode": {},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "num_kv_heads": 1},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "rwkv": {"attention_hidden_size": 64, "context_length": 256},
    "xlstm": {"num_heads": 4, "num_blocks": 2, "head_dim": None, "qk_dim_factor": 1.0},
    "modernbert-decoder": {"global_attn_every_n_layers": 2, "local_attention": 16},
    "bitnet": {},
    "openai-gpt": {},
    "ctrl": {"dff": 96},
    "gemma3": {},
    "bart": {"d_model": 64, "decoder_ffn_dim": 96, "decoder_layers": 2,
             "decoder_attention_heads": 4},
}  # fmt: skip
"""Model type → configuration in addition to `COMMON`."""


@dataclass(frozen=True)
class FamilyResult:
    """Result of one family.

    Attributes:
        family: model type in transformers.
        batches: ``packed``, ``padded`` or ``refused``; ``failed`` otherwise.
        base_difference: difference to transformers' loss of the base, nats per token.
        adapter_difference: difference to PEFT's loss of the adapter, nats per token.
        same_reply: whether a greedy reply of the adapter has the most likely tokens under PEFT.
        reason: of the refusal or failure; else notes.
    """

    family: str
    batches: str
    base_difference: float = math.nan
    adapter_difference: float = math.nan
    same_reply: bool = False
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Refused, or equal to rounding."""
        if self.batches == "refused":
            return True
        # `<=` is false for NaN.
        return (
            self.batches in ("packed", "padded")
            and self.base_difference <= BOUND
            and self.adapter_difference <= BOUND
            and self.same_reply
        )


def make_tokenizer() -> Any:
    """Byte-level BPE trained on the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<eos>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>"
    )


def texts() -> list[str]:
    """Short distinct texts of various lengths."""
    topics = ("rivers", "bread", "glass", "bees", "maps", "clocks", "tea", "salt")
    return [
        f"Note {number} on {topics[number % 8]}: "
        + f"{topics[(3 * number) % 8]} and {topics[(5 * number + 1) % 8]} differ. "
        * (1 + number * 7 % 5)
        for number in range(48)
    ]


def make_model(family: str, folder: Path) -> None:
    """Save a small model with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = FAMILIES[family]
    torch.manual_seed(0)
    config = vision_config(ids) if family == "gemma3" else None
    if config is None:
        settings = COMMON | ids | settings
        if settings["head_dim"] is None:
            del settings["head_dim"]
        config = AutoConfig.for_model(family, **settings)
    model_class: Any = AutoModelForCausalLM
    model = model_class.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # Initial biases and norms are 0 and 1, which would hide their wrong use.
        if parameter.ndim <= 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vision_config(ids: dict[str, Any]) -> Any:
    """Gemma 3 with its vision tower, whose modules share names with the decoder's."""
    from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**(COMMON | ids | WINDOWS | {"query_pre_attn_scalar": 16}))
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7, eos_token_id=ids["eos_token_id"],  # type: ignore[call-arg]
    )  # fmt: skip


RECIPE = """name: zoo
model: {{name: {model}}}
data: {{name: {rows}, test_rows: 12, validation_rows: 4, max_length: 128}}
adapter: {{r: 4, target_modules: all-linear}}
training:
  {{max_steps: 4, learning_rate: 1e-2, effective_batch_size: 8, precision: fp32, device: cpu}}
"""


def try_family(family: str, in_process: bool = False) -> FamilyResult:
    """Make a model, run the command on it, compare losses and reply."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, rows = folder / "model", folder / "rows.jsonl"
        make_model(family, model)
        rows.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts()), "utf-8")
        recipe = folder / "zoo.yaml"
        recipe.write_text(RECIPE.format(model=model, rows=rows), encoding="utf-8")
        args = ["experiment", str(recipe), "--results", str(folder / "results")]
        args += ["--adapters", str(folder / "adapter")]
        code, output = (run_here if in_process else run_command)(args)
        runs = folder / "results" / "zoo" / "runs"
        lines = [line for line in output.splitlines() if line.strip()]
        last_line = lines[-1] if lines else ""
        if code == 2 and "Traceback" not in output and not runs.exists():
            return FamilyResult(family, "refused", reason=last_line.replace(name, ""))
        if code != 0:
            return FamilyResult(family, "failed", reason=f"exit {code}: {last_line}")
        return compare(family, model, folder, runs, output)


def run_command(args: list[str]) -> tuple[int, str]:
    """Run the command in a process; exit code and output."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, "-c", "from slm_lora.cli import main; main()", *args]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return process.returncode, process.stdout + process.stderr


def run_here(args: list[str]) -> tuple[int, str]:
    """Run the command in this process, which is faster; exit code and output."""
    import contextlib
    import io
    import traceback

    from slm_lora.cli import app
    from slm_lora.errors import SlmLoraError

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            app(args, standalone_mode=False)
            code = 0
        except SlmLoraError as error:
            print(error)
            code = error.exit_code
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}")
            code = 1
    return code, output.getvalue()


def compare(family: str, model: Path, folder: Path, runs: Path, output: str) -> FamilyResult:
    """Compare losses to those of transformers and PEFT."""
    import pyarrow.parquet as pq
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    records = {
        record["cell"]: (path.parent, record)
        for path in runs.glob("*/run.json")
        for record in [json.loads(path.read_text("utf-8"))]
    }
    (adapter,) = (folder / "adapter").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = {}
    base_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    peft_model = None
    differences = {}
    for cell in sorted(records, key=lambda cell: cell != "base"):
        run_folder, record = records[cell]
        if cell != "base":
            peft_model = PeftModel.from_pretrained(base_model, str(adapter)).eval()
        scores = pq.read_table(run_folder / "scores.parquet")
        row_ids = set(scores.column("row_id").to_pylist())
        total = tokens = 0.0
        for text in texts():
            if row_id(text) not in row_ids:
                continue
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                prediction = (peft_model or base_model)(input_ids=ids, use_cache=False)
            logits = prediction.logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            lengths[text] = ids.shape[1]
        ours = record["evaluation"]["all"]
        assert ours["tokens"] == tokens, (ours["tokens"], tokens)
        differences[cell] = abs(total / tokens - ours["loss"])
    base = differences.pop("base")
    (adapter_difference,) = differences.values()
    packed = records["base"][1]["model"]["packed"]
    notes = [line.strip() for line in output.splitlines() if "note:" in line]
    return FamilyResult(
        family, "packed" if packed else "padded", base, adapter_difference,
        same_reply(model, adapter, tokenizer, peft_model),
        "; ".join(re.sub(r"^note: ", "", note) for note in notes),
    )  # fmt: skip


def same_reply(model: Path, adapter: Path, tokenizer: Any, peft_model: Any) -> bool:
    """Whether a greedy reply has the most likely tokens under PEFT's logits of the whole text."""
    import torch

    from slm_lora.adapters.multi import load_adapter_set
    from slm_lora.evaluation.generation import Generation, Sampling

    ids = list(tokenizer(texts()[0])["input_ids"])
    variants = load_adapter_set(str(model), [adapter], device="cpu", precision="fp32")
    generation = Generation(variants, variants.names[-1], ids, Sampling(10))
    list(generation.pieces())
    for token in generation.ids:
        with torch.no_grad():
            logits = peft_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        # Tokens that are equally likely up to rounding are equivalent.
        if float(logits.max() - logits[token]) > 1e-4 * float(logits.abs().max()):
            return False
        ids.append(token)
    return True


def row_id(text: str) -> str:
    """Row id in scores: SHA-256 of the canonical content."""
    import hashlib

    content = json.dumps(["", [["assistant", text]]], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="families; without any, all, and the page")
    parser.add_argument("--in-process", action="store_true", help="faster, but unlike real use")
    args = parser.parse_args()
    start, outcomes = time.time(), []
    for family in args.families or FAMILIES:
        try:
            outcome = try_family(family, args.in_process)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            outcome = FamilyResult(family, "failed", reason=f"{type(error).__name__}: {first}")
        outcomes.append(outcome)
        mark = "ok   " if outcome.passed else "WRONG"
        print(
            f"{mark} {family:20} {outcome.batches:8} {outcome.base_difference:8.1e} "
            f"{outcome.adapter_difference:8.1e} {'same' if outcome.same_reply else '-':4}  "
            f"{outcome.reason[:300]}",
            flush=True,
        )
    wrong = [outcome.family for outcome in outcomes if not outcome.passed]
    print(f"{len(outcomes)} families in {time.time() - start:.0f} s; wrong: {wrong or 'none'}")
    if not args.families:
        PAGE.write_text(page(outcomes, args.in_process), encoding="utf-8")
    sys.exit(bool(wrong))


PACKED = "packed"


def page(outcomes: list[FamilyResult], in_process: bool) -> str:
    """docs/models.md."""
    from slm_lora.runtime import hardware

    versions = hardware.versions()
    counts = Counter(outcome.batches for outcome in outcomes)
    largest = max(
        max(o.base_difference, o.adapter_difference) for o in outcomes if o.batches != "refused"
    )
    lines = [
        "# Model families",
        "",
        "Model types of transformers that were tested, with their largest difference in",
        "held-out loss from plain transformers and PEFT. For each type the real command",
        "trained a small model with random weights for four steps (LoRA on all linear",
        "layers, fp32). The loss of every test row, under base and adapter, and a greedy",
        "reply of the adapter were then computed again by transformers and PEFT alone. A",
        "type either gives the same loss up to rounding and the same reply, or is refused",
        "before any training. This page is written by:",
        "",
        "```",
        "make zoo                      # all types; some: make zoo ARGS='llama gpt2'",
        "```",
        "",
        f"{len(outcomes)} families: {counts[PACKED]} packed, {counts['padded']} padded,",
        f"{counts['refused']} refused. Largest difference {largest:.1e} nats per token (allowed:",
        f"{BOUND:.0e}). Run with torch {versions['torch']},",
        f"transformers {versions['transformers']} and PEFT {versions['peft']} on a CPU",
        f"({hardware.processor()}){', all in one process (`--in-process`)' * in_process}.",
        "",
        "*Packed*: documents are concatenated without padding; attention does not cross",
        "documents.",
        "*Padded*: the model's own attention on padded batches, because it has a sliding",
        "window, a recurrent state, or attention that cannot be replaced. The loss is the",
        "same, the speed lower.",
        "*Base*, *adapter*: largest difference in nats per token. *Remarks*: messages of the",
        "command.",
        "",
        "| model type | batches | base, nats | adapter, nats | remarks |",
        "| :-- | :-- | --: | --: | :-- |",
    ]
    for o in sorted(outcomes, key=lambda o: o.family):
        numbers = (
            ("–", "–")
            if o.batches == "refused"
            else (f"{o.base_difference:.0e}", f"{o.adapter_difference:.0e}")
        )
        lines.append(f"| `{o.family}` | {o.batches} | {numbers[0]} | {numbers[1]} | {remark(o)} |")
    return "\n".join(lines) + "\n"


def remark(outcome: FamilyResult) -> str:
    """The command's message, without what other columns of the table contain."""
    reason = outcome.reason.replace("model model: ", "").replace(" of model", "")
    reason = reason.replace(f"{outcome.family} computes padded batches: ", "")
    return reason.replace("|", "\\|")


if __name__ == "__main__":
    main()
