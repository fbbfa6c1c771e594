"""The registry of methods agrees with the schema and with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn, get_args

import pytest

from slm_lora.adapters.methods import (
    METHODS,
    Method,
    method_of,
    peft_config,
    peft_types,
    trains_all,
    trial_section,
    unmergeable_reason,
)
from slm_lora.adapters.targets import Targets
from slm_lora.config.schema import AdapterSection
from slm_lora.config.types import METHOD_LABELS, MethodName
from slm_lora.errors import UsageError
from slm_lora.model.resolve import ModelSource

SOURCE = ModelSource("org/base", "abc", Path("nowhere"), "0")
ADAPTERS = [name for name, method in METHODS.items() if method.config]


def test_every_method_of_the_schema_has_a_label_and_a_registry_entry() -> None:
    assert set(get_args(MethodName)) == set(METHOD_LABELS) == set(METHODS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_configuration_is_of_the_registered_peft_type(name: MethodName) -> None:
    section = AdapterSection(kind=name, r=4)
    config = peft_config(section, SOURCE, Targets(("q_proj",)))
    assert config.peft_type is not None
    assert config.peft_type.value == method_of(section).peft_type
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "abc")


@pytest.mark.parametrize("name", ADAPTERS)
def test_trial_section_of_any_method_leaves_the_base_unmodified(name: MethodName) -> None:
    trial = trial_section(AdapterSection(kind=name, r=64), rank=2)
    assert trial.r == 2
    assert not method_of(trial).modifies_base


def test_full_fine_tuning_has_no_peft_config() -> None:
    section = AdapterSection(kind="full")
    assert trains_all(section) and method_of(section).modifies_base
    with pytest.raises(ValueError, match="full has no adapter"):
        peft_config(section, SOURCE, Targets(()))


def test_unmergeable_peft_type_has_a_reason() -> None:
    assert peft_types() == {"LORA"}
    assert unmergeable_reason("LORA") == ""
    assert unmergeable_reason("IA3") == "peft_type IA3 is none of LORA"


def test_method_that_cannot_exclude_modules_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*given: object) -> NoReturn:
        raise TypeError(
            "VeraConfig.__init__() got an unexpected keyword argument 'exclude_modules'"
        )

    monkeypatch.setitem(METHODS, "lora", Method(refuse))
    with pytest.raises(UsageError, match=r"adapter\.kind = lora: PEFT cannot exclude modules"):
        peft_config(AdapterSection(), SOURCE, Targets(("q_proj",), ("vision.q_proj",)))
