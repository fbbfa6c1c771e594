"""Methods besides LoRA: full fine-tuning, PiSSA, LoRA+, and which modules they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.check import check_forward, reached_modules
from slm_lora.adapters.methods import METHODS, Method, peft_config
from slm_lora.adapters.targets import resolve_targets
from slm_lora.config.schema import AdapterSection, ModelSection, TrainingSection
from slm_lora.data.collate import collate
from slm_lora.errors import UsageError
from slm_lora.model.base import DTYPES, Base
from slm_lora.model.forward import batch_nll, document_logits
from slm_lora.model.resolve import resolve
from slm_lora.training.loop import train
from slm_lora.training.optimizer import adamw

from ..support.examples import LENGTHS, load, make_examples, save_model
from ..support.tensors import assert_equal_bits, relative_error

LoadTiny = Callable[..., Base]
FULL = AdapterSection(kind="full")


def full_gradients(base: Base, seed: int, double: bool = False) -> torch.Tensor:
    """Gradients of all weights of the summed NLL."""
    trained = attach.attach(base, FULL, seed=0)
    trained.train()
    if double:
        trained.double()
    batch_nll(base, collate(make_examples(LENGTHS, seed), "all")).backward()
    return torch.cat([p.grad.double().flatten() for p in trained.parameters()])


def test_full_fine_tuning_gradients_equal_fp64(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DTYPES, "fp64", torch.float64)
    seeds = range(4)
    references = [full_gradients(load_tiny("fp64", plain=True), s, double=True) for s in seeds]

    def error(precision: str, plain: bool) -> float:
        gradients = [full_gradients(load_tiny(precision, plain=plain), seed) for seed in seeds]
        pairs = zip(gradients, references, strict=True)
        return sum(relative_error(gradient, exact) for gradient, exact in pairs) / 4

    assert error("fp32", plain=False) < 1e-5
    # One rounding moves all that lies below it: single draws differ by a fifth either way.
    assert error("bf16", plain=False) < 1.15 * error("bf16", plain=True)


def test_fully_trained_model_is_saved_as_a_model_folder(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    base = load_tiny("bf16")
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    trained = attach.attach(base, FULL, seed=0)
    counted = attach.count_parameters(trained)
    assert counted.trainable == counted.total == sum(p.numel() for p in before.values())
    section = TrainingSection(max_steps=3, effective_batch_size=2, learning_rate=1e-3)
    result = train(base, trained, make_examples(LENGTHS), section, seed=0)
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    assert result.history[-1].loss < result.history[0].loss
    adapter_io.save(base, trained, tmp_path / "model", {"base": {}}, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name))
        assert not torch.equal(parameter, before[name]), f"{name} did not train"


def test_saved_pissa_adapter_fits_the_original_base(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny("fp32")
    peft_model = attach.attach(
        base,
        AdapterSection(kind="pissa", r=4, lora_dropout=0, target_modules=("q_proj", "v_proj")),
        seed=0,
    )
    batch = collate(make_examples(LENGTHS), "all")
    untouched = batch_nll(load_tiny("fp32"), batch).item()
    # It begins where the base is, though the base's own weights are others.
    assert batch_nll(base, batch).item() == pytest.approx(untouched, rel=1e-5)
    section = TrainingSection(max_steps=4, effective_batch_size=2, learning_rate=1e-2)
    train(base, peft_model, make_examples(LENGTHS), section, seed=0)
    trained = batch_nll(base, batch).item()
    assert abs(trained - untouched) > 0.01 * untouched
    adapter_io.save(base, peft_model, tmp_path / "adapter", {"base": {}}, None)

    fresh = load_tiny("fp32")
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, True)
    assert batch_nll(fresh, batch).item() == pytest.approx(trained, rel=1e-5)


def test_loraplus_ratio_scales_the_learning_rate_of_b(load_tiny: LoadTiny) -> None:
    def moved(ratio: float | None) -> float:
        """Largest change of a B in AdamW's first step, which is its learning rate."""
        base = load_tiny("fp32")
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0, target_modules=("q_proj", "v_proj")), seed=0
        )
        section = TrainingSection(max_steps=1, learning_rate=1e-4, loraplus_lr_ratio=ratio)
        train(base, peft_model, make_examples(LENGTHS), section, seed=0)
        change = max(
            p.abs().max().item() for n, p in peft_model.named_parameters() if "lora_B" in n
        )
        attach.detach(peft_model)
        return change

    assert moved(None) == pytest.approx(1e-4, rel=1e-3)
    assert moved(16) == pytest.approx(16e-4, rel=1e-3)


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_norms_and_biases_have_no_weight_decay(load_tiny: LoadTiny, kind: str) -> None:
    trained = attach.attach(
        load_tiny("fp32"),
        AdapterSection(kind=kind, lora_dropout=0, target_modules=("q_proj", "v_proj")),
        seed=0,
    )
    named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    optimizer = adamw(named, TrainingSection(learning_rate=2e-4, weight_decay=0.1), trained)
    name_of = {id(parameter): name for name, parameter in named.items()}
    ours = {
        name_of[id(parameter)]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    theirs: Any = Trainer.get_decay_parameter_names
    assert ours == set(theirs(None, trained)) & named.keys()
    if kind == "full":
        assert {n for n in named if n not in ours} == {n for n in named if "norm" in n}


def save_gemma_with_vision(folder: Path) -> Path:
    """Gemma 3: text decoder and vision tower both have q_proj and v_proj."""
    text = transformers.Gemma3TextConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(config, folder, 0.2)
    return folder


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_adapters_are_not_attached_to_a_vision_tower(tmp_path: Path, targets: Any) -> None:
    base = load(save_gemma_with_vision(tmp_path))
    section = AdapterSection(r=4, target_modules=targets)
    peft_model = attach.attach(base, section, seed=0)
    names = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert names
    assert all(".language_model." in name for name in names)
    peft_model.train()
    batch_nll(base, collate(make_examples([20, 9]), "all"), "seed").backward()
    assert all(p.grad is not None for n, p in peft_model.named_parameters() if p.requires_grad)
    if targets == "all-linear":
        assert "without adapters stay" in attach.unadapted_note(peft_model)


def test_full_fine_tuning_freezes_vision_tower_and_projector(tmp_path: Path) -> None:
    base = load(save_gemma_with_vision(tmp_path))
    trained = attach.attach(base, FULL, seed=0)
    frozen = [name for name, p in trained.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("vision_tower" in name or "projector" in name for name in frozen)
    assert "stay frozen" in attach.unadapted_note(trained)


def test_all_linear_leaves_out_layers_peft_refuses(tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16,
        state_size=8, n_groups=1, chunk_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(config, tmp_path, 0.2)
    base = load(tmp_path)
    peft_model = attach.attach(base, AdapterSection(target_modules="all-linear"), seed=0)
    names = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, _ in peft_model.named_parameters()
    }
    assert "in_proj" in names
    assert "out_proj (2)" in attach.unadapted_note(peft_model)
    with pytest.raises(UsageError, match=r"PEFT refuses them on .*out_proj"):
        attach.attach(load(tmp_path), AdapterSection(target_modules=("out_proj",)), seed=0)


def save_mixture(folder: Path) -> Path:
    config = transformers.Qwen3MoeConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(config, folder, 0.2)
    return folder


def test_all_linear_adapts_experts_without_dropout(tmp_path: Path) -> None:
    folder = save_mixture(tmp_path)
    peft_model = attach.attach(load(folder), AdapterSection(target_modules="all-linear"), seed=0)
    assert "the experts" in attach.unadapted_note(peft_model)
    without = AdapterSection(target_modules="all-linear", lora_dropout=0)
    peft_model = attach.attach(load(folder), without, seed=0)
    assert any(".experts." in n for n, p in peft_model.named_parameters() if p.requires_grad)
    experts = AdapterSection(target_modules=("gate_proj", "up_proj", "down_proj"))
    with pytest.raises(UsageError, match="dropout"):
        attach.attach(load(folder), experts, seed=0)


def test_unknown_target_module_is_refused_before_loading(tmp_path: Path) -> None:
    source = resolve(ModelSection(name=str(save_mixture(tmp_path))))
    with pytest.raises(UsageError, match="has no q_porj"):
        resolve_targets(source, AdapterSection(target_modules=("q_porj", "v_proj")))


@pytest.mark.parametrize(
    "settings", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_check_forward_refuses_adapters_outside_the_layers(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(config, tmp_path / "base", 0.2)
    base = load(tmp_path / "base")
    foreign = get_peft_model(base.model, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with pytest.raises(UsageError, match="works outside of the layers"):
        check_forward(base, foreign)


def test_check_forward_refuses_activated_lora(load_tiny: LoadTiny) -> None:
    base = load_tiny("fp32", plain=True)
    activated = LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[3, 4]
    )
    foreign = get_peft_model(base.model, activated)
    with pytest.raises(UsageError, match="differ from PEFT's"):
        check_forward(base, foreign)


def test_check_forward_changes_no_weight_gradient_or_random_state(load_tiny: LoadTiny) -> None:
    base = load_tiny("fp32")
    peft_model = attach.attach(
        base, AdapterSection(r=4, target_modules=("q_proj", "v_proj")), seed=5
    )
    before = attach.trainable_state(peft_model)
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    check_forward(base, peft_model)
    reached, unreached = reached_modules(base, peft_model)
    assert torch.equal(torch.rand(1), drawn)
    assert_equal_bits(attach.trainable_state(peft_model), before)
    assert all(p.grad is None for p in peft_model.parameters())
    assert len(reached) == 4
    assert not unreached


def vera(section: AdapterSection, source: Any, targets: Any, seed: int) -> VeraConfig:
    """An entry of the registry for a PEFT type that is not among the project's."""
    return VeraConfig(
        r=section.r, vera_dropout=section.lora_dropout, projection_prng_key=seed,
        target_modules=list(targets.modules), task_type="CAUSAL_LM",
        base_model_name_or_path=source.name,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plain", [False, True])
def test_registered_vera_method_trains_and_is_loaded_again(
    load_tiny: LoadTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    plain: bool,
) -> None:
    """Attached, checked against PEFT, trained, saved, and loaded again, packed and padded."""
    monkeypatch.setitem(METHODS, "lora", Method(vera, peft_type="VERA", loads_as_lora=False))
    section = AdapterSection(r=4, target_modules=["q_proj", "o_proj"])
    base = load_tiny(precision, plain=plain)
    peft_model = attach.attach(base, section, seed=3)
    config = peft_config(section, base.source, resolve_targets(base.source, section), 4)
    assert config.projection_prng_key == 4
    training = TrainingSection(max_steps=3, effective_batch_size=2, learning_rate=1e-2)
    train(base, peft_model, make_examples(LENGTHS), training, seed=0)
    documents = [torch.arange(1, 9), torch.arange(3, 6)]
    peft_model.eval()
    expected = document_logits(base, documents)
    about = {"base": {"name": base.source.name, "sha256": base.source.sha256}}
    adapter_io.save(base, peft_model, tmp_path / "adapter", about, None)
    attach.detach(peft_model)
    assert not torch.equal(document_logits(base, documents), expected), "the adapter did nothing"
    loaded = adapter_io.load(base, tmp_path / "adapter")
    loaded.eval()
    assert torch.equal(document_logits(base, documents), expected)
