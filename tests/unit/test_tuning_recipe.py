"""Mistakes in the section `tuning` of a recipe: one line each, with the key and the way out."""

from __future__ import annotations

import pytest

from slm_lora.config.load import parse_recipe
from slm_lora.errors import UsageError

RECIPE = """\
name: x
model: {name: m}
data: {name: d}
adapter: {r: 4}
seeds: [0, 1]
"""
RATES = "values: [1e-3, 1e-2]"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            f"{{{RATES}, seeds: [1, 1000]}}",
            "tuning.seeds = [1]: also seeds of the experiment; tuning runs need seeds of their own",
        ),
        (f"{{{RATES}, seeds: []}}", "tuning: seeds must be different, and at least one"),
        (f"{{{RATES}, seeds: [7, 7]}}", "tuning: seeds must be different, and at least one"),
        ("{values: [abc, 1e-2]}", "= abc: must be a number"),
        ("{values: [1e-3, .nan]}", "= nan: must be finite"),
        ("{values: [-1e-3, 1e-2]}", "values of training.learning_rate must be above 0"),
        ("{values: [0, 1e-2]}", "values of training.learning_rate must be above 0"),
        ("{values: [1e-3]}", "training.learning_rate needs at least two different values"),
        ("{values: [1e-3, 1e-3]}", "training.learning_rate needs at least two different values"),
        ("{values: 1e-3}", "tuning.values = 1e-3: must be a list"),
        ("{key: training.weight_decay}", "training.weight_decay needs values: auto is for"),
        ("{values: rule}", "tuning.values = rule: must be a list"),
        (f"{{{RATES}, common_value: 0}}", "tuning.common_value = 0: must be greater than 0"),
        (
            f"{{key: training.learning_rat, {RATES}}}",
            "unknown key 'training.learning_rat'; did you mean 'training.learning_rate'?",
        ),
        (f"{{key: training, {RATES}}}", "tuning.key = training: 'training' is a section"),
        (f"{{key: adapter.kind, {RATES}}}", "must be a key of adapter or training with a number"),
        ("{key: seed, values: [1, 2]}", "must be a key of adapter or training with a number"),
        ("{key: adapter.r, values: [4, 8.5]}", "adapter.r = 8.5: must be a whole number"),
        ("{key: adapter.lora_dropout, values: [0.5, 2]}", "= 2.0: must be less than 1"),
        (
            f"{{key: [training.learning_rate, training.weight_decay], {RATES}}}",
            "as many lists of values as keys are needed; keys: 2, lists: 1",
        ),
    ],
)
def test_mistake_in_the_section(section: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe(f"{RECIPE}tuning: {section}\n", "x.yaml")
    (line,) = str(error.value).splitlines()
    assert line.startswith("x.yaml: ")
    assert message in line


def test_key_that_the_grid_varies_cannot_be_tuned() -> None:
    grid = "grid: {axes: [{training.learning_rate: [1e-3, 1e-2]}]}\n"
    with pytest.raises(UsageError, match="the grid varies it, too; remove it from one of them"):
        parse_recipe(f"{RECIPE}{grid}tuning: {{{RATES}}}\n", "x.yaml")


@pytest.mark.parametrize("setting", ["keep_best: true", "early_stopping_patience: 2"])
def test_tuning_chooses_by_the_end_of_training(setting: str) -> None:
    training = f"training: {{eval_steps: 5, {setting}}}\n"
    with pytest.raises(UsageError, match="tuning chooses by the validation set at the end"):
        parse_recipe(f"{RECIPE}{training}tuning: {{{RATES}}}\n", "x.yaml")
