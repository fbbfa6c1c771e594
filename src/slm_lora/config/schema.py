"""Schema of an experiment: sections, keys, defaults, grid points.

Names are those of PEFT and TRL where they have one. Files and overrides are read in `load`, errors
explained in `validation`, and cells made in `grid`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from slm_lora.config.axes import GridSection, TuningSection
from slm_lora.config.conditions import parse_ship
from slm_lora.config.forgetting import ForgettingSection
from slm_lora.config.judge import JudgeSection
from slm_lora.config.replies import RepliesSection
from slm_lora.config.tasks import TasksSection
from slm_lora.config.types import (
    RELATED_BY,
    Float,
    FormatName,
    Int,
    MethodName,
    Precision,
    Relation,
    RunOptions,
    Section,
    TrackerName,
    no_bool,
)
from slm_lora.records import LossOn


class ModelSection(Section):
    """The base model."""

    name: str = Field(
        "smollm2-135m-instruct-q4_1",
        description="Hub id, local folder, or the embedded model `smollm2-135m-instruct-q4_1`. "
        "Not supported: quantised weights (bitsandbytes, GPTQ, AWQ, fp8), and adapters.",
    )
    revision: str | None = Field(
        None, description="Hub revision (branch, tag or commit); hub ids only."
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="`nf4`: frozen weights in 4 bits (QLoRA); needs bitsandbytes. The adapter and "
        "the activations are not quantised.",
    )


class DataSection(Section):
    """Source of the rows, prompt format, split sizes."""

    name: str = Field(
        "ml-qa",
        description="Hub id, local file (JSON lines, JSON, CSV, TSV, text, Parquet; text also "
        "`.gz`), folder of such files, or `ml-qa`.",
    )
    revision: str | None = Field(None, description="Hub revision; hub ids only.")
    split: str = Field("train", description="Split of a hub data set to take rows from.")
    format: FormatName = Field("auto", description="Row format; `auto`: detected from the columns.")
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Column of each field, where names differ, e.g. `{response: answer}`. Also for "
        "`category`, `group` and `system`; null ignores a column: `{category: null}`.",
    )
    text_rows: Literal["auto", "lines", "paragraphs"] = Field(
        "auto",
        description="Rows of a `.txt` file; `auto`: paragraphs if the file has blank lines between "
        "them, else lines.",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail",
        description="Malformed rows: stop the run, or skip and count them (at most 10 % of the "
        "rows; rows marked as rejected do not count towards it).",
    )
    template: str = Field(
        "auto",
        description="`instruction_response`, `chat` (the tokenizer's chat template), `plain`, the "
        "path of a `.jinja` file, or `auto`: by format.",
    )
    include_context: bool | Literal["auto"] = Field(
        "auto",
        description="Insert a row's context (Alpaca's `input`) between instruction and response; "
        "`auto`: if the rows have one.",
    )
    size: Int | None = Field(
        None,
        ge=2,
        description="Size N of the data set; 0.9·N rows are used for training. Unset: all rows "
        "outside the test and validation sets.",
    )
    test_rows: Int | None = Field(None, ge=1, description="Test rows. Unset: 10 %, at most 1,000.")
    validation_rows: Int | None = Field(
        None, ge=1, description="Validation rows. Unset: 5 %, at most 300."
    )
    group_by: tuple[Relation, ...] = Field(
        RELATED_BY,
        description="Relations between rows that keep them on one side of the split. `group`: same "
        "value in the group column (the only relation of rows that have one). `prompt`: same "
        "instruction, and same context if it is part of the prompt; conversations with an opening "
        "that more than 10 % share are compared by system text and later questions as well. "
        "`instruction`: same instruction, any context. `context`: same context, of five words or "
        "more. `near`: near-duplicate prompts (words of a template that more than 10 % share do "
        "not count). `[]`: none.",
    )
    near_duplicate_threshold: Float = Field(
        0.8,
        gt=0,
        le=1,
        description="Least Jaccard similarity of the words of two prompts for `near`.",
    )
    max_length: Int = Field(512, ge=2, description="Longest sequence, in tokens.")
    on_long_row: Literal["truncate", "drop", "refuse", "split"] = Field(
        "truncate",
        description="Handling of rows longer than max_length; they are counted. `split`: plain "
        "text is cut into pieces without loss of tokens; each piece is an example, and the pieces "
        "of a row stay on one side of the split.",
    )
    special_tokens_in_responses: Literal["text", "special"] = Field(
        "text",
        description="Special tokens spelt in responses: encoded as ordinary text (no row can "
        "inject them), or as the special tokens, for a model that has to generate them.",
    )
    split_seed: Int = Field(
        0, ge=0, description="Seed of the test and validation split; the same for all cells."
    )

    @field_validator("group_by", mode="before")
    @classmethod
    def _wrap_single_relation(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("group_by")
    @classmethod
    def _canonical_order(cls, value: tuple[Relation, ...]) -> tuple[Relation, ...]:
        # A run's identity must not depend on the order.
        return tuple(relation for relation in get_args(Relation) if relation in value)


class AdapterSection(Section):
    """Trained parameters; names as in `peft.LoraConfig`."""

    kind: MethodName = Field(
        "lora",
        description="PEFT method, or `full`: full fine-tuning, where the keys below have no "
        "effect. A `pissa` adapter is saved with rank 2r, for the original base.",
    )
    r: Int = Field(8, ge=1, description="Rank.")
    lora_alpha: Annotated[float | str, BeforeValidator(no_bool)] = Field(
        "2r", description="Numerator of the scaling: a number, or a multiple of r such as `2r`."
    )
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    bias: Literal["none"] = Field("none", description="Biases stay frozen.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear",
        description="Names of modules to adapt, or `all-linear`: every linear layer of the text "
        "decoder but the output layer.",
    )

    @field_validator("lora_alpha")
    @classmethod
    def _check_alpha(cls, value: float | str) -> float | str:
        multiple = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?r", value)
        try:
            number = float(str(value).removesuffix("r") if multiple else value)
        except ValueError:
            raise ValueError("must be a number or a multiple of the rank such as 2r") from None
        # Also refuses nan, inf and 1e999: text in YAML, numbers in Python.
        if not 0 < number < math.inf:
            raise ValueError("must be greater than 0, and finite")
        return value if multiple else number

    @field_validator("target_modules", mode="before")
    @classmethod
    def _wrap_single_name(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value != "all-linear" else value

    @field_validator("target_modules")
    @classmethod
    def _check_not_empty(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not value:
            raise ValueError("must name at least one module")
        return value

    @property
    def alpha(self) -> float:
        """``lora_alpha`` as a number."""
        if isinstance(self.lora_alpha, str):
            return float(self.lora_alpha[:-1]) * self.r
        return float(self.lora_alpha)


class TrainingSection(Section):
    """Training loop and optimizer; names as in `transformers.TrainingArguments` and TRL."""

    num_train_epochs: Float = Field(3, gt=0, description="Passes over the training rows.")
    max_steps: Int | None = Field(None, ge=1, description="Limit of optimizer steps.")
    effective_batch_size: Int = Field(16, ge=1, description="Examples per optimizer step.")
    micro_batch_tokens: Int = Field(
        2048,
        ge=1,
        description="Largest micro-batch, in tokens: limits memory; results change by rounding "
        "only. (On a CPU, adapters use at most 512, compiled ones 768 in fp32: as fast, and with "
        "less memory.)",
    )
    fsdp: bool = Field(
        False,
        description="With several processes: shard the frozen base's layers over them (FSDP2), for "
        "a base that does not fit on one device.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Store only the inputs of layers, and recompute each layer in the backward "
        "pass: less memory, more time.",
    )
    loss_on: LossOn = Field("all", description="Tokens in the loss: whole text, or response only.")
    learning_rate: Annotated[Float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="Peak learning rate; `auto`: by a rule of the model's width, the method, rank, "
        "alpha and batch size, a starting point (see below).",
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after warm-up (to 0, unless constant)."
    )
    warmup_ratio: Float = Field(0.0, ge=0, lt=1, description="Share of the steps for warm-up.")
    loraplus_lr_ratio: Float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B as a multiple of that of A."
    )
    weight_decay: Float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW β₁.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="AdamW β₂.")
    adam_epsilon: Float = Field(1e-8, gt=0, description="AdamW ε.")
    max_grad_norm: Float = Field(1.0, gt=0, description="Limit of gradient clipping (L2 norm).")
    precision: Precision = Field(
        "auto", description="Precision of the frozen base; the adapter is always fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device to compute on."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the model's layers for training and scoring; results change by "
        "rounding only. `auto`: if the run is long enough to pay for compiling and a compiler is "
        "available (C++ on a CPU, Triton on a GPU).",
    )
    eval_steps: Int | None = Field(
        None, ge=1, description="Optimizer steps between scorings of the validation set."
    )
    keep_best: bool = Field(False, description="Keep the adapter with the best validation loss.")
    early_stopping_patience: Int | None = Field(
        None, ge=1, description="Stop after this many validations without a lower loss."
    )

    @property
    def peak_rate(self) -> float:
        """``learning_rate`` as a number.

        Raises:
            ValueError: it is ``auto``, which a job resolves when its model is known.
        """
        if self.learning_rate == "auto":
            raise ValueError("training.learning_rate is auto, and not resolved yet")
        return self.learning_rate

    @field_validator("keep_best", "early_stopping_patience")
    @classmethod
    def _needs_eval_steps(cls, value: int | None, info: ValidationInfo) -> int | None:
        # An invalid eval_steps is absent from info.data, and reported by itself.
        if value and info.data.get("eval_steps", value) is None:
            raise ValueError("needs training.eval_steps")
        return value


class EvaluationSection(Section):
    """Scoring of the base and the adapters."""

    headline: LossOn = Field(
        "all",
        description="Tokens whose loss is compared in tables, intervals and tests; both losses "
        "are reported. `response` fits `training.loss_on: response`.",
    )
    micro_batch_tokens: Int = Field(
        4096, ge=1, description="Largest micro-batch in scoring, in tokens: limits memory."
    )
    equivalence_margin: Float = Field(
        0.01, gt=0, description="Margin of equivalence of two cells, in nats per token."
    )


class CellConfig(Section):
    """Complete configuration of one run."""

    model: ModelSection = Field(default_factory=lambda: ModelSection())
    data: DataSection = Field(default_factory=lambda: DataSection())
    adapter: AdapterSection = Field(default_factory=lambda: AdapterSection())
    training: TrainingSection = Field(default_factory=lambda: TrainingSection())
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection())
    seed: Int = Field(0, ge=0, description="Seed of initialisation, order and dropout.")
    data_seed: Int = Field(
        0,
        ge=0,
        description="Seed of the draw of training rows. Unset: the cell's seed if the grid varies "
        "data.size and `seeds` are given, else 0.",
    )


LATER_KEYS: dict[str, dict[str, object]] = {
    "model": {"quantization": None},
    "data": {
        "text_rows": "auto",
        "group_by": list(RELATED_BY),
        "near_duplicate_threshold": 0.8,
        "special_tokens_in_responses": "text",
    },
    "training": {"activation_checkpointing": False, "fsdp": False},
}
"""Keys added after the first recorded runs, with the value that those runs had: at that value a key
is no part of a run's identity, and records without the key are read with it."""


class Recipe(CellConfig):
    """An experiment: settings of a cell, varied by a grid and by seeds."""

    name: str = Field(
        description="Name of the experiment and of its folder.",
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        max_length=100,
    )
    description: str = Field("", description="One line, printed when the experiment starts.")
    grid: GridSection = Field(
        default_factory=lambda: GridSection(), description="Cells; unset: one cell."
    )
    tuning: TuningSection | None = Field(
        None, description="Keys whose value is chosen for each setting on the validation set."
    )
    seeds: tuple[Int, ...] = Field((), description="Seeds; each runs the whole grid.")
    replies: RepliesSection | None = Field(
        None, description="Replies to test rows after training, and their metrics."
    )
    tasks: TasksSection | None = Field(
        None, description="Standard tasks after training, through lm-evaluation-harness."
    )
    forgetting: ForgettingSection | None = Field(
        None, description="Drift from the base and losses on further sets, after training."
    )
    judge: JudgeSection | None = Field(
        None,
        description="Defaults of `slm-lora judge --recipe`, which compares the replies.",
    )
    keep_adapters: bool = Field(
        True,
        description="False: adapters are removed after scoring, and a cell is finished once it has "
        "scores. For large grids, where only scores are needed.",
    )
    report_to: tuple[TrackerName, ...] = Field(
        (), description="Trackers that log every step, besides steps.jsonl."
    )
    checkpoint_seconds: Float = Field(
        60,
        ge=0,
        description="Least seconds between checkpoints: the most training time lost if the process "
        "is killed. 0: after every step.",
    )

    ship: dict[str, str] = Field(
        default_factory=dict,
        description="Conditions of `slm-lora verdict`: measurements with bounds in quotes, such as "
        '`{gain: "> 0.02", all: "<= 2.1"}`. They change no run.',
    )

    @field_validator("ship", mode="before")
    @classmethod
    def _are_conditions(cls, value: object) -> object:
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            parse_ship(value)
        return value

    @property
    def run_options(self) -> RunOptions:
        """The keys that affect no result."""
        return RunOptions(self.keep_adapters, self.report_to, self.checkpoint_seconds)
