"""Names of recipe keys in other tools, for the suggestions of error messages."""

from __future__ import annotations

_BATCH = "training.effective_batch_size (examples per step: batch × accumulation × processes)"
_SCORING = "evaluation.micro_batch_tokens (affects memory only, not results)"
_MODEL, _DATA = "model.name", "data.name"
_4_BITS = "model.quantization=nf4"
_HELD_OUT = "data.test_rows (a number of rows, not a share)"

ALIASES = {
    "training.learning_rate": "lr learning_rates lr_rate base_lr max_lr peak_lr lora_lr step_size",
    "training.lr_scheduler_type": "lr_scheduler scheduler scheduler_type schedule lr_schedule",
    "training.num_train_epochs": "epochs num_epochs n_epochs epoch max_epochs train_epochs",
    "training.max_steps": "steps num_steps n_steps iters max_iters num_iters train_steps",
    "training.warmup_ratio": "warmup lr_warmup_ratio warmup_fraction",
    "training.warmup_ratio (a share of the steps)": "warmup_steps num_warmup_steps lr_warmup_steps",
    "training.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm gradient_clip_val "
    "grad_norm clip",
    "training.weight_decay": "wd decay",
    "training.adam_beta1": "beta1 adam_b1",
    "training.adam_beta2": "beta2 adam_b2",
    "training.adam_epsilon": "eps epsilon adam_eps",
    "training.loraplus_lr_ratio": "lora_plus loraplus lora_plus_lr_ratio loraplus_ratio",
    "training.activation_checkpointing": "gradient_checkpointing grad_checkpoint "
    "use_gradient_checkpointing checkpointing activation_offloading",
    "training.precision=bf16": "bf16 bfloat16 use_bf16",
    "training.precision=fp16": "fp16 float16 half use_fp16",
    "training.precision": "dtype torch_dtype mixed_precision compute_dtype amp",
    "training.device": "device_map accelerator use_cpu no_cuda gpu cuda gpus",
    "training.compile": "torch_compile use_compile",
    "training.fsdp": "fsdp_config sharding deepspeed",
    "training.eval_steps": "eval_interval eval_every evaluation_steps val_interval eval_freq "
    "steps_per_eval val_check_interval eval_strategy evaluation_strategy",
    "training.keep_best": "load_best_model_at_end save_best",
    "training.early_stopping_patience": "early_stopping patience early_stop",
    "training.loss_on=response": "train_on_responses_only completion_only_loss mask_prompt "
    "assistant_only_loss train_on_completions response_only completion_only",
    "training.loss_on (response: not on prompts)": "train_on_prompt train_on_inputs train_on_input",
    _BATCH: "batch_size batch bs train_batch_size per_device_train_batch_size micro_batch_size "
    "per_device_batch_size global_batch_size gradient_accumulation_steps "
    "gradient_accumulation grad_accum accumulation_steps grad_accum_steps accumulate_grad_batches",
    _SCORING: "eval_batch_size per_device_eval_batch_size val_batch_size",
    "adapter.r": "rank lora_rank lora_r lora_dim peft_rank lora_dimension",
    "adapter.lora_alpha": "alpha peft_alpha scaling scale lora_scale",
    "adapter.lora_dropout": "dropout peft_dropout",
    "adapter.target_modules": "lora_target targets target lora_target_modules modules "
    "lora_modules target_module lora_layers lora_target_linear",
    "adapter.target_modules=all-linear": "all_linear",
    "adapter.kind=rslora": "use_rslora rslora",
    "adapter.kind=dora": "use_dora dora peft_use_dora lora_use_dora",
    "adapter.kind=pissa": "pissa_init pissa",
    "adapter.kind": "adapter_type peft_type method finetuning_type train_type tuner "
    "fine_tune_type init_lora_weights peft_method",
    "adapter.kind=full": "full_finetuning full_finetune",
    "adapter.bias": "lora_bias",
    _MODEL: "model_name model_name_or_path base_model model_id model_path base pretrained "
    "pretrained_model_name_or_path base_model_name_or_path hf_model checkpoint",
    "model.revision": "model_revision base_model_revision",
    _4_BITS: "load_in_4bit use_4bit qlora quant quantize quantization_bit bnb_4bit_quant_type "
    "load_in_8bit bits nf4",
    _DATA: "dataset datasets dataset_name dataset_path dataset_id data_path train_file data_files "
    "train_data train_dataset dataset_name_or_path train path",
    "data.revision": "dataset_revision",
    "data.split": "dataset_split train_split",
    "data.format": "dataset_format format_type dataset_type",
    "data.columns": "column_mapping dataset_text_field text_column field_mapping text_field fields",
    "data.template": "chat_template prompt_template template_name conversation_template "
    "prompt_style",
    "data.include_context": "use_context context include_input",
    "data.size": "max_samples num_samples n_samples max_train_samples subset_size train_size "
    "num_examples dataset_size subset train_rows n max_examples",
    _HELD_OUT: "test_size val_size eval_size test_ratio val_set_size eval_dataset_size "
    "validation_split train_test_split test_split test_fraction",
    "data.validation_rows": "val_rows validation_size eval_rows",
    "data.max_length": "max_seq_length max_seq_len seq_len sequence_len sequence_length cutoff_len "
    "max_len model_max_length context_length block_size max_tokens ctx_len",
    "data.on_long_row": "truncation truncate truncation_strategy",
    "data.split_seed": "test_seed",
    "seed": "random_seed rng_seed random_state manual_seed training_seed",
    "seeds": "num_seeds n_seeds",
    "name": "run_name experiment experiment_name project",
    "adapter": "lora peft peft_config lora_config",
    "training": "trainer training_args training_arguments sft sft_config hyperparameters",
    "evaluation": "eval evaluator",
    "data": "data_args data_config",
    "report_to": "logger loggers tracker trackers log_with logging",
    "grid.axes": "sweep axis",
    "grid.cells": "cell",
    "checkpoint_seconds": "save_steps save_interval save_strategy save_every",
    "keep_adapters": "save_adapters save_model",
}
"""Foreign names by the equivalent key; text in brackets after a key is a remark for the message."""

_KEY_BY_ALIAS = {name: key for key, names in ALIASES.items() for name in names.split()}


NO_EQUIVALENT = {
    **dict.fromkeys(("packing", "sample_packing", "group_by_length"), "rows are always packed"),
    **dict.fromkeys(("optim", "optimizer"), "the optimizer is always AdamW"),
    **dict.fromkeys(
        ("logging_steps", "log_every", "logging_strategy"), "every step is logged to steps.jsonl"
    ),
    **dict.fromkeys(
        ("output_dir", "output_path", "save_dir", "out_dir", "adapter_path"),
        "folders are set by --results and --adapters",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token"), "slm-lora push uploads a finished run"
    ),
    **dict.fromkeys(("trust_remote_code",), "a model's own code is never run"),
    **dict.fromkeys(("do_train", "do_eval"), "an experiment always trains and scores"),
    **dict.fromkeys(("resume_from_checkpoint", "resume"), "the same command resumes by itself"),
    **dict.fromkeys(
        ("num_processes", "nproc_per_node", "world_size"), "set by --processes or torchrun"
    ),
}
"""Names from other tools without an equivalent key, and the reason."""


def key_for_alias(name: str) -> str:
    """The key, or ``key=value``, that other tools call ``name``, with its remark; empty for an
    unknown name."""
    return _KEY_BY_ALIAS.get(name, "")
