"""The one schema of an experiment: sections, defaults, and how a grid unfolds into cells.

Names are those of PEFT and TRL where they have one. Reading a file, applying overrides and
explaining mistakes is in ``reading`` and ``mistakes``, unfolding the grid in ``cells``.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from slm_lora.config.types import (
    RELATED_BY,
    Float,
    FormatName,
    Int,
    MethodName,
    Precision,
    Relation,
    RunOptions,
    TrackerName,
    no_bool,
)
from slm_lora.records import LossOn


class Section(BaseModel):
    """Base of all sections: unknown keys are mistakes, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model that everything is compared against."""

    name: str = Field(
        "smollm2-135m-instruct-q4_1",
        description="Hub id, local folder, or the embedded model `smollm2-135m-instruct-q4_1`. "
        "Refused: weights that are quantised already (bitsandbytes, GPTQ, AWQ, fp8), and adapters.",
    )
    revision: str | None = Field(
        None, description="Hub revision (branch, tag or commit); hub ids only."
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="`nf4`: the frozen weights in 4 bits (QLoRA); needs bitsandbytes. The adapter "
        "and what is computed with it are not quantised.",
    )


class DataSection(Section):
    """Where the rows come from, how they become text, and how many are used for what."""

    name: str = Field(
        "ml-qa",
        description="Hub id, local file (JSON lines, JSON, CSV, TSV, text, Parquet; text also "
        "`.gz`), folder of such files, or `ml-qa`.",
    )
    revision: str | None = Field(None, description="Hub revision; hub ids only.")
    split: str = Field("train", description="Split of a hub data set that the rows are taken from.")
    format: FormatName = Field(
        "auto", description="Row format; `auto` recognises it by the columns."
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Other column names: canonical field → column, e.g. `{response: answer}`. "
        "`category`, `group` and `system` may be named too; null leaves a column out: "
        "`{category: null}`.",
    )
    text_rows: Literal["auto", "lines", "paragraphs"] = Field(
        "auto",
        description="What is a row of a `.txt` file; `auto`: a paragraph where blank lines part "
        "them, else a line.",
    )
    on_bad_row: Literal["fail", "skip"] = Field(
        "fail",
        description="Malformed rows stop the run, or are skipped and counted (a tenth at most; "
        "rows that are marked as rejected, however many).",
    )
    template: str = Field(
        "auto",
        description="`instruction_response`, `chat` (the tokenizer's own), `plain`, the path of "
        "a `.jinja` file, or `auto` by format.",
    )
    include_context: bool | Literal["auto"] = Field(
        "auto",
        description="Put a row's context (Alpaca's `input`) between instruction and response; "
        "`auto`: where rows have one.",
    )
    size: Int | None = Field(
        None,
        ge=2,
        description="Dataset size N; 0.9·N of it are training rows. All that is left, if unset.",
    )
    test_rows: Int | None = Field(
        None, ge=1, description="Test rows (the headline). Unset: a tenth, at most 1,000."
    )
    validation_rows: Int | None = Field(
        None, ge=1, description="Validation rows. Unset: a twentieth, at most 300."
    )
    group_by: tuple[Relation, ...] = Field(
        RELATED_BY,
        description="What makes rows related, so that no split parts them. `group`: their own "
        "column (rows that name a group are tied by that alone). `prompt`: the same instruction, "
        "with its context where that is part of the prompt; conversations that begin as more than "
        "a tenth of all do are told apart by system text and later questions. `instruction`: the "
        "same one, whatever the context. `context`: the same one, of five words or more. `near`: "
        "prompts that share most of their words (without those of a template that more than a "
        "tenth of the rows have). `[]`: every row by itself.",
    )
    near_duplicate_threshold: Float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of all words of two prompts, from which `near` ties them.",
    )
    max_length: Int = Field(512, ge=2, description="Longest sequence, in tokens.")
    on_long_row: Literal["truncate", "drop", "refuse", "split"] = Field(
        "truncate",
        description="What happens to rows longer than max_length; always counted. `split`: plain "
        "text is cut into pieces, of which no token is lost; each piece is an example of its own, "
        "and the pieces of a row stay on one side of the split.",
    )
    special_tokens_in_responses: Literal["text", "special"] = Field(
        "text",
        description="Special tokens of the tokenizer that responses spell: ordinary text (no row "
        "can forge them), or the tokens themselves, for a model that is to write them.",
    )
    split_seed: Int = Field(
        0, ge=0, description="Draws test and validation set; the same for all cells."
    )

    @field_validator("group_by", mode="before")
    @classmethod
    def _one_relation_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("group_by")
    @classmethod
    def _each_relation_once(cls, value: tuple[Relation, ...]) -> tuple[Relation, ...]:
        # One order, as the same relations are the same setting.
        return tuple(each for each in get_args(Relation) if each in value)


class AdapterSection(Section):
    """What is trained; names as in `peft.LoraConfig`."""

    kind: MethodName = Field(
        "lora",
        description="PEFT method, or `full`: every weight of the model, and the keys below have "
        "no effect. An adapter of `pissa` is saved as one of rank 2r that fits the original base.",
    )
    r: Int = Field(8, ge=1, description="Rank.")
    lora_alpha: Annotated[float | str, BeforeValidator(no_bool)] = Field(
        "2r", description="Scaling numerator: a number, or a multiple of the rank such as `2r`."
    )
    lora_dropout: Float = Field(0.05, ge=0, lt=1, description="Dropout before the adapter.")
    bias: Literal["none"] = Field("none", description="Biases stay frozen.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        ("q_proj", "v_proj"), description="Module names that get an adapter, or `all-linear`."
    )

    @field_validator("lora_alpha")
    @classmethod
    def _alpha_is_number_or_multiple(cls, value: float | str) -> float | str:
        multiple = isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?r", value)
        try:
            number = float(str(value).removesuffix("r") if multiple else value)
        except ValueError:
            raise ValueError("must be a number or a multiple of the rank such as 2r") from None
        # Also what YAML takes for text, and Python for a number: nan, inf, 1e999.
        if not 0 < number < math.inf:
            raise ValueError("must be greater than 0, and finite")
        return value if multiple else number

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value != "all-linear" else value

    @field_validator("target_modules")
    @classmethod
    def _some_target(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
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
    """How the adapter is trained; names as in `transformers.TrainingArguments` and TRL."""

    num_train_epochs: Float = Field(3, gt=0, description="Passes over the training rows.")
    max_steps: Int | None = Field(None, ge=1, description="Stop after so many optimizer steps.")
    effective_batch_size: Int = Field(16, ge=1, description="Examples per optimizer step.")
    micro_batch_tokens: Int = Field(
        2048,
        ge=1,
        description="Most tokens computed at once: the memory knob. Results move by rounding only. "
        "(On a CPU adapters take 512 at most, compiled ones 768 in fp32: as fast, and smaller.)",
    )
    fsdp: bool = Field(
        False,
        description="Several processes: share the frozen base's layers out over them (FSDP2), for "
        "a base that does not fit one device.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only the inputs of layers, and compute each again in the backward pass: "
        "less memory, more time.",
    )
    loss_on: LossOn = Field("all", description="Tokens trained on: whole text, or response only.")
    learning_rate: Float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Decay after the warm-up (to 0, unless constant)."
    )
    warmup_ratio: Float = Field(0.0, ge=0, lt=1, description="Share of the steps for warm-up.")
    loraplus_lr_ratio: Float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B as a multiple of that of A."
    )
    weight_decay: Float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW).")
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW β₁.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="AdamW β₂.")
    adam_epsilon: Float = Field(1e-8, gt=0, description="AdamW ε.")
    max_grad_norm: Float = Field(1.0, gt=0, description="Gradient norm is clipped to this.")
    precision: Precision = Field(
        "auto", description="Of the frozen base; the adapter is always fp32."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the model's layers, for training and scoring. Results move by "
        "rounding. `auto`: where the run is long enough to win the time back and a compiler is "
        "there (C++ on a CPU, Triton on a GPU).",
    )
    eval_steps: Int | None = Field(
        None, ge=1, description="Score the validation set every so many optimizer steps."
    )
    keep_best: bool = Field(False, description="Keep the adapter of the best validation loss.")
    early_stopping_patience: Int | None = Field(
        None, ge=1, description="Stop after so many validations without a better loss."
    )

    @field_validator("keep_best", "early_stopping_patience")
    @classmethod
    def _needs_eval_steps(cls, value: int | None, info: ValidationInfo) -> int | None:
        # eval_steps is not among the data if it is wrong itself.
        if value and info.data.get("eval_steps", value) is None:
            raise ValueError("needs training.eval_steps")
        return value


class EvaluationSection(Section):
    """How base and adapters are scored."""

    headline: LossOn = Field(
        "all",
        description="Tokens whose loss table, intervals and comparisons are of; both are "
        "reported. `response` goes with `training.loss_on: response`.",
    )
    micro_batch_tokens: Int = Field(
        4096, ge=1, description="Tokens scored at once: the memory knob."
    )
    equivalence_margin: Float = Field(
        0.01, gt=0, description="Nats per token that count as no difference between two cells."
    )


class GridSection(Section):
    """The cells of the experiment: listed, or as the product of axes."""

    cells: tuple[dict[str, Any], ...] = Field(
        (), description="Cells as mappings of dotted keys, e.g. `{data.size: 1500, adapter.r: 8}`."
    )
    axes: tuple[dict[str, tuple[Any, ...]], ...] = Field(
        (),
        description="Axes to be multiplied; keys within one axis move together (tied values).",
    )

    @model_validator(mode="after")
    def _well_formed(self) -> GridSection:
        if self.cells and self.axes:
            raise ValueError("give cells or axes, not both")
        for axis in self.axes:
            if not axis or not all(axis.values()):
                raise ValueError("an axis has no values")
            if len({len(values) for values in axis.values()}) != 1:
                raise ValueError(f"keys of one axis need equally many values: {sorted(axis)}")
        keys = [key for axis in self.axes for key in axis]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"keys in two axes, where one would hide the other: {twice}")
        return self

    def count(self) -> int:
        """How many cells there are; one if no grid."""
        if self.cells:
            return len(self.cells)
        return math.prod(len(next(iter(axis.values()))) for axis in self.axes)

    def settings(self) -> list[dict[str, Any]]:
        """One mapping of dotted keys a cell, in the order written; one empty cell if no grid."""
        if self.cells:
            return [dict(cell) for cell in self.cells]
        unfolded = [
            [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]
            for axis in self.axes
        ]
        return [
            {key: value for part in parts for key, value in part.items()}
            for parts in itertools.product(*unfolded)
        ]


class CellConfig(Section):
    """One cell: everything that one run needs to know."""

    model: ModelSection = Field(default_factory=lambda: ModelSection())
    data: DataSection = Field(default_factory=lambda: DataSection())
    adapter: AdapterSection = Field(default_factory=lambda: AdapterSection())
    training: TrainingSection = Field(default_factory=lambda: TrainingSection())
    evaluation: EvaluationSection = Field(default_factory=lambda: EvaluationSection())
    seed: Int = Field(0, ge=0, description="Initialisation, order and dropout.")
    data_seed: Int = Field(
        0,
        ge=0,
        description="Which rows the training subset takes. Unset, it goes with `seeds` where the "
        "grid varies data.size.",
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
"""Keys that came after runs were recorded, with what those runs had: at that value a key is no part
of a run's identity, and a record without it is read as if it had it."""


class Recipe(CellConfig):
    """An experiment: a cell's settings, varied by a grid and by seeds."""

    name: str = Field(
        description="Name of the experiment and of its folder.",
        pattern=r"^[a-z0-9][a-z0-9._-]*$",
        max_length=100,
    )
    description: str = Field("", description="One line for people.")
    grid: GridSection = Field(
        default_factory=lambda: GridSection(), description="The cells; unset: one cell."
    )
    seeds: tuple[Int, ...] = Field((), description="Seeds, each over the whole grid.")
    keep_adapters: bool = Field(
        True,
        description="False: an adapter is removed once it is scored, and a finished cell is one "
        "with scores. For large grids of which only the numbers are wanted.",
    )
    report_to: tuple[TrackerName, ...] = Field(
        (), description="Trackers that are told of every step, besides our own files."
    )
    checkpoint_seconds: Float = Field(
        60,
        ge=0,
        description="Least seconds between two checkpoints of a training: the most work that is "
        "lost when the process is killed. 0: after every step.",
    )

    @property
    def run_options(self) -> RunOptions:
        """The keys that change no result."""
        return RunOptions(self.keep_adapters, self.report_to, self.checkpoint_seconds)
