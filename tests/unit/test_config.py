"""Recipes: complete validation with precise errors, values, grids, files, arbitrary input."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slm_lora.config.aliases import ALIASES, NO_EQUIVALENT
from slm_lora.config.grid import MAX_CELLS, Cell
from slm_lora.config.load import load_recipe, parse_recipe
from slm_lora.config.schema import LATER_KEYS, CellConfig, DataSection, Recipe
from slm_lora.config.validation import known_keys
from slm_lora.errors import UsageError
from slm_lora.experiment.resume import differences

FILE = "my.yaml"


def read(text: str, *overrides: str) -> tuple[Recipe, list[Cell]]:
    return parse_recipe(text, FILE, overrides)


def cells(text: str, *overrides: str) -> list[Cell]:
    return read(f"name: x\n{text}", *overrides)[1]


def names(text: str, *overrides: str) -> list[str]:
    return [cell.name for cell in cells(text, *overrides)]


def error_lines(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        read(text, *overrides)
    return str(caught.value).split("\n")


def error_message(text: str, *overrides: str) -> str:
    """The only error of a recipe that has a name."""
    (message,) = error_lines(f"name: x\n{text}", *overrides)
    return message


# --- error messages ----------------------------------------------------------------------------


def test_all_errors_of_a_recipe_are_reported_at_once() -> None:
    text = (
        "name: Big Words\n"
        "data:\n"
        "  formt: dolly\n"
        "  max_length: 1\n"
        "adapter:\n"
        "  lora_dropout: 1.5\n"
        "  kind: loar\n"
        "training:\n"
        "  learning_rate: fast\n"
        "seeds: [0, one]\n"
    )
    assert error_lines(text, "adapter.rr=16", "training.num_train_epochs=-1") == [
        "my.yaml: data.max_length = 1: must be greater than or equal to 2 (line 4)",
        "my.yaml: unknown key 'data.formt' (line 3); did you mean 'data.format'?",
        "my.yaml: adapter.kind = loar: must be 'lora', 'rslora', 'dora', 'pissa' or 'full' "
        "(line 7); did you mean 'lora'?",
        "my.yaml: adapter.lora_dropout = 1.5: must be less than 1 (line 6)",
        "override: training.num_train_epochs = -1: must be greater than 0",
        "my.yaml: training.learning_rate = fast: must be a number (line 9)",
        "my.yaml: name = Big Words: must be of a-z, 0-9 and . _ -, a letter or digit first "
        "(line 1)",
        "my.yaml: seeds.1 = one: must be a whole number (line 10)",
        "override: unknown key 'adapter.rr'; did you mean 'adapter.r'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("adaptr: {r: 8}", "unknown key 'adaptr' (line 2); did you mean 'adapter'?"),
        ("data: {colums: {}}", "unknown key 'data.colums' (line 2); did you mean 'data.columns'?"),
        # the right name in the wrong section
        ("\nr: 8", "unknown key 'r' (line 3); did you mean 'adapter.r'?"),
        ("data: {lr_scheduler_type: linear}", "did you mean 'training.lr_scheduler_type'?"),
        ("zzz: 1", "unknown key 'zzz' (line 2)"),
        ("adapter.r: 8", "'adapter.r' must be written as 'r' under 'adapter' (line 2)"),
        (
            "adapter:\n  kind: 3",
            "adapter.kind = 3: must be 'lora', 'rslora', 'dora', 'pissa' or 'full' (line 3)",
        ),
        ("adapter:", "adapter = null: must be a mapping of keys to values (line 2)"),
        (
            "model: a/b",
            "model = a/b: must be a mapping of keys to values (did you mean 'model: {name: a/b}'?)",
        ),
        ("data: rows.jsonl", "did you mean 'data: {name: rows.jsonl}'?"),
        ("lr: 3", "unknown key 'lr' (line 2); did you mean 'training.learning_rate'?"),
        ("lora: {r: 8}", "unknown key 'lora' (line 2); did you mean 'adapter'?"),
        ("packing: true", "unknown key 'packing' (line 2); not an option: rows are always packed"),
        ("adapter: 5", "adapter = 5: must be a mapping of keys to values (line 2)"),
        ("data: {columns: [a]}", "data.columns = ['a']: must be a mapping of keys to values"),
        ("data: {columns: {float: 3}}", "data.columns.float = 3: must be text (line 2)"),
        ("data: {columns: {3: a}}", "data.columns.3: a key must be text (line 2)"),
        ("3: a", "3: a key must be text (line 2)"),
        ("adapter: {lora_alpha: [1]}", "adapter.lora_alpha = [1]: must be a number (line 2)"),
        ("adapter: {target_modules: 5}", "adapter.target_modules = 5: must be a list (line 2)"),
        ("adapter: {target_modules: [v, 5]}", "adapter.target_modules.1 = 5: must be text"),
        ("adapter: {target_modules: []}", "must name at least one module (line 2)"),
        ("training: {keep_best: maybe}", "training.keep_best = maybe: must be true or false"),
        ("training: {keep_best: true}", "training.keep_best = true: needs training.eval_steps"),
        ("training: {early_stopping_patience: 2}", "needs training.eval_steps (line 2)"),
        ("description: {a: 1}", "description: must be text (line 2)"),
        ("model: {name: null}", "model.name = null: must be text (line 2)"),
        (f"name2: 1\n# {'x' * 99}", "did you mean 'name'?"),
        (f"data: {{name: [{'word, ' * 99}]}}", "data.name = ['word', 'word', 'word', 'word', "),
    ],
)
def test_recipe_error_names_file_key_and_suggestion(text: str, expected: str) -> None:
    message = error_message(text)
    assert message.startswith("my.yaml: ")
    assert expected in message
    assert len(message) < 200


def test_invalid_eval_steps_is_reported_alone() -> None:
    assert "eval_steps = 0" in error_message("training: {eval_steps: 0, keep_best: true}")


def test_duplicate_keys_of_a_recipe_are_refused() -> None:
    errors = error_lines("name: x\ndata:\n  size: 30\n  name: a\n  size: 40\nname: x\n")
    assert errors == [
        "my.yaml: 'data.size' is written twice (line 5)",
        "my.yaml: 'name' is written twice (line 6)",
    ]


def test_recipe_without_a_name_is_refused() -> None:
    assert error_lines("") == error_lines("# nothing\n") == ["my.yaml: 'name' is missing"]
    assert read("", "name=x")[0].name == "x"


def test_recipe_that_is_no_mapping_or_no_yaml_is_refused() -> None:
    for text in ("- a", "a", "3", "[]"):
        assert error_lines(text) == ["my.yaml: must be a mapping of keys to values"]
    assert error_lines("name: x\ndata: [1\n") == [
        "my.yaml: not valid YAML: expected ',' or ']', but got '<stream end>' (line 3)"
    ]
    assert error_lines("name: x\n\tdata: 3")[0].endswith("(line 2)")
    assert "undefined alias" in error_lines("name: *x")[0]


def test_recipe_errors_are_single_printable_lines() -> None:
    text = 'name: "a\\nb\\e[31m\\u2028"\n"k\\nk": 1\n!<!%0A> x: 1\n'
    assert len(error_lines(text)) == 1
    errors = error_lines('name: "a\\nb\\e[31m\\u2028"\n"k\\nk": 1\n')
    assert len(errors) == 2
    assert all(line.isprintable() for line in errors)
    assert r"name = a\nb\x1b[31m\u2028: must be" in errors[0]


# --- overrides ---------------------------------------------------------------------------------


def test_an_override_is_applied_and_read_as_yaml() -> None:
    text = "name: x\nadapter: {r: 4, lora_dropout: 0.1}\n"
    recipe, _ = read(
        text,
        "adapter.r=16",
        "training.learning_rate=1e-3",
        "data.columns.response=answer",
        "adapter.target_modules=[k_proj, o_proj]",
        "data.size=null",
        "description=a=b",
        "training.keep_best=no",
        " seeds = [1, 2]",
    )
    assert (recipe.adapter.r, recipe.adapter.lora_dropout) == (16, 0.1)
    assert recipe.training.learning_rate == 0.001
    assert recipe.data.columns == {"response": "answer"}
    assert recipe.adapter.target_modules == ("k_proj", "o_proj")
    assert recipe.data.size is None
    assert recipe.description == "a=b"
    assert recipe.training.keep_best is False
    assert recipe.seeds == (1, 2)
    assert read("name: x\ndescription: long", "description=")[0].description == ""
    assert read("name: x\nadapter:\n", "adapter.r=4")[0].adapter.r == 4


def test_the_last_override_of_a_key_counts() -> None:
    assert read("name: x", "adapter.r=4", "adapter.r=2")[0].adapter.r == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.r=0", "override: adapter.r = 0: must be greater than or equal to 1"),
        ("adapter.r=", "override: adapter.r = : must be a whole number"),
        ("adapter.rr=16", "override: unknown key 'adapter.rr'; did you mean 'adapter.r'?"),
        ("r=16", "override: unknown key 'r'; did you mean 'adapter.r'?"),
        ("adapter.r", "override: 'adapter.r' is not key=value"),
        ("=", "override: '=' is not key=value"),
        ("", "override: '' is not key=value"),
        (" =1", "override: ' =1' is not key=value"),
        (".=1", "override: unknown key '.'"),
        ("a..b=1", "override: unknown key 'a..b'"),
        ("data..size=1", "override: unknown key 'data..size'; did you mean 'data.size'?"),
        ("name.x=1", "override: unknown key 'name.x'; did you mean 'name'?"),
        ("data.columns.=1", "override: unknown key 'data.columns.'; did you mean 'data.columns'?"),
        ("data.columns.a=1", "override: data.columns.a = 1: must be text"),
        ("grid.cells=3", "override: grid.cells = 3: must be a list"),
        ("grid.cells=[3]", "override: grid.cells.0 = 3: must be a mapping of keys to values"),
        (
            "grid.cells=[{r: 3}]",
            "override: grid cell 1: unknown key 'r'; did you mean 'adapter.r'?",
        ),
        ("grid.axes.0=3", "override: unknown key 'grid.axes.0'; did you mean 'grid.axes'?"),
        (
            "data={size: 30}",
            "override: 'data' is a section; set a key of it, such as 'data.name'",
        ),
        ("lr=1e-3", "unknown key 'lr'; did you mean 'training.learning_rate'?"),
        ("training.lr=1e-3", "did you mean 'training.learning_rate'?"),
        ("--learning-rate=1e-3", "did you mean 'training.learning_rate'?"),
        ("Epochs=3", "did you mean 'training.num_train_epochs'?"),
        ("max_seq_length=8", "did you mean 'data.max_length'?"),
        ("lora.rank=8", "did you mean 'adapter.r'?"),
        ("batch_size=8", "did you mean 'training.effective_batch_size'? (examples per step"),
        ("gradient_accumulation_steps=8", "did you mean 'training.effective_batch_size'?"),
        ("load_in_4bit=true", "did you mean 'model.quantization=nf4'?"),
        (
            "training.optim=adamw_torch",
            "'training.optim'; not an option: the optimizer is always AdamW",
        ),
        ("grid.cells=[{lr: 3}]", "unknown key 'lr'; did you mean 'training.learning_rate'?"),
        ("adapter.r=[1", "override: adapter.r = [1: not valid YAML"),
        ("adapter.r=" + "[" * 1500, "not valid YAML"),
        ("adapter.r=!!timestamp x", "override: adapter.r = !!timestamp x: not valid YAML"),
        ("adapter.r=!!python/name:os.system", "not valid YAML"),
        ('description="\\ud800"', "not valid YAML"),
    ],
)
def test_invalid_override_is_refused_with_a_suggestion(override: str, expected: str) -> None:
    message = error_message("", override)
    assert expected in message
    assert message.startswith("override: ")
    assert len(message) < 200


def test_aliases_name_existing_keys() -> None:
    known = set(known_keys())
    taken = {key.rsplit(".", 1)[-1] for key in known}
    names = " ".join(ALIASES.values()).split()
    assert len(names) == len(set(names)), "a name that means two keys"
    assert not taken & {*names, *NO_EQUIVALENT}
    assert not set(NO_EQUIVALENT) & set(names)
    for key_and_remark in ALIASES:
        key, _, value = key_and_remark.split(" ")[0].partition("=")
        assert key in known
        if value:
            cells("", f"{key}={value}")


def test_recipe_errors_name_their_source() -> None:
    text = "name: x\ndata: {size: 1}\nadapter: 8\n"
    assert error_lines(text, "data.test_rows=0", "adapter.r=8") == [
        "my.yaml: data.size = 1: must be greater than or equal to 2 (line 2)",
        "override: data.test_rows = 0: must be greater than or equal to 1",
        "my.yaml: adapter = 8: must be a mapping of keys to values (line 3)",
    ]


def test_override_without_effect_is_refused() -> None:
    grid = "grid: {cells: [{adapter.r: 8, data.size: 20}, {adapter.r: 16}]}"
    assert "adapter.r has no effect: 'grid' sets it" in error_message(grid, "adapter.r=4")
    assert [cell.config.data.size for cell in cells(grid, "data.size=30")] == [20, 30]
    assert "seed has no effect: 'seeds' sets it" in error_message("seeds: [1, 2]", "seed=4")
    assert [cell.config.seed for cell in cells("", "seed=4")] == [4]


# --- values ------------------------------------------------------------------------------------


def test_numbers_may_be_spelt_in_any_yaml_form() -> None:
    for value_text in ("2e-4", "2.0e-4", "0.0002", "'2e-4'"):
        recipe, _ = read(f"name: x\ntraining: {{learning_rate: {value_text}}}")
        assert recipe.training.learning_rate == 0.0002
        assert read("name: x", f"training.learning_rate={value_text}")[0] == recipe
    assert read("name: x\ntraining: {num_train_epochs: 0.5}")[0].training.num_train_epochs == 0.5


@pytest.mark.parametrize(
    "key", ["data.size", "adapter.r", "training.max_steps", "seed", "adapter.lora_dropout"]
)
@pytest.mark.parametrize("value_text", ["true", "yes", "off"])
def test_booleans_are_refused_as_numbers(key: str, value_text: str) -> None:
    assert "must be a number, not true or false" in error_message("", f"{key}={value_text}")


def test_boolean_among_the_seeds_is_refused() -> None:
    assert "seeds.1 = true: must be a number" in error_message("seeds: [0, yes]")


@pytest.mark.parametrize(
    ("value_text", "alpha"),
    [("2r", 32), ("1.5r", 24), ("16", 16), ("'16'", 16), ("0.5", 0.5), ("1e1", 10)],
)
def test_alpha_is_a_number_or_a_multiple_of_the_rank(value_text: str, alpha: float) -> None:
    recipe, _ = read(f"name: x\nadapter: {{r: 16, lora_alpha: {value_text}}}")
    assert recipe.adapter.alpha == alpha


@pytest.mark.parametrize(
    ("value_text", "expected"),
    [
        ("3x", "must be a number or a multiple of the rank such as 2r"),
        ("r", "must be a number or a multiple of the rank such as 2r"),
        ("-2r", "must be a number or a multiple of the rank such as 2r"),
        ("0", "must be greater than 0"),
        ("-1", "must be greater than 0"),
        ("0r", "must be greater than 0"),
        ("nan", "must be greater than 0, and finite"),
        ("inf", "must be greater than 0, and finite"),
        ("1e999", "must be greater than 0, and finite"),
        (".inf", "must be finite"),
        ("true", "must be a number, not true or false"),
        ("null", "must be a number"),
    ],
)
def test_invalid_lora_alpha_is_refused(value_text: str, expected: str) -> None:
    message = error_message("", f"adapter.lora_alpha={value_text}")
    assert message.startswith("override: adapter.lora_alpha = ")
    assert expected in message


@pytest.mark.parametrize("value_text", [".nan", ".inf", "-.inf", "1e999", "nan"])
def test_infinite_numbers_are_refused(value_text: str) -> None:
    assert "must be finite" in error_message("", f"training.max_grad_norm={value_text}")


@pytest.mark.parametrize(
    "value_text", [str(2**63), "9" * 400, "0x" + "f" * 9000, "-0x" + "f" * 9000]
)
def test_seeds_beyond_64_bits_are_refused(value_text: str) -> None:
    message = error_message("", f"seed={value_text}")
    assert "must be" in message
    assert len(message) < 200
    assert read("name: x", f"seed={2**63 - 1}")[0].seed == 2**63 - 1


def test_single_target_module_is_read_as_a_list_of_one() -> None:
    recipe, _ = read("name: x\nadapter: {target_modules: q_proj}")
    assert recipe.adapter.target_modules == ("q_proj",)
    recipe, _ = read("name: x\nadapter: {target_modules: all-linear}")
    assert recipe.adapter.target_modules == "all-linear"


def test_equal_settings_serialise_equally() -> None:
    once = read("name: x\ntraining: {learning_rate: 2e-4, num_train_epochs: 3}\nadapter: {r: 8}")[0]
    again = read("adapter:\n  r: 8.0\nname: 'x'\ntraining:\n  learning_rate: 0.0002\n")[0]
    assert once.model_dump_json() == again.model_dump_json()
    assert once != read("name: x", "adapter.r=4")[0]


# --- the grid ----------------------------------------------------------------------------------


def test_recipe_without_a_grid_is_one_cell() -> None:
    (cell,) = cells("adapter: {r: 4}\nseed: 3")
    assert (cell.name, cell.settings) == ("r4", {})
    assert cell.config == CellConfig.model_validate({"adapter": {"r": 4}, "seed": 3})


def test_listed_cells_share_other_settings() -> None:
    expanded = cells(
        "adapter: {lora_dropout: 0.2, r: 2}\n"
        "grid: {cells: [{data.size: 1500, adapter.r: 8}, {adapter.r: 16}, {}]}"
    )
    assert [cell.name for cell in expanded] == ["r8-1500", "r16", "r2"]
    assert [cell.config.adapter.r for cell in expanded] == [8, 16, 2]
    assert [cell.config.data.size for cell in expanded] == [1500, None, None]
    assert {cell.config.adapter.lora_dropout for cell in expanded} == {0.2}
    assert expanded[0].settings == {"data.size": 1500, "adapter.r": 8}


def test_axes_are_multiplied_and_keys_of_one_axis_stay_tied() -> None:
    expanded = cells(
        "grid:\n"
        "  axes:\n"
        "    - {data.size: [100, 200, 300]}\n"
        "    - {adapter.r: [8, 16], adapter.lora_alpha: [32, 2r]}\n"
    )
    values = [(c.config.data.size, c.config.adapter.r, c.config.adapter.alpha) for c in expanded]
    assert values == [(size, r, 32.0) for size, r in itertools.product((100, 200, 300), (8, 16))]
    assert [c.name for c in expanded[:2]] == ["r8-100-alpha32", "r16-100"]


def test_cells_are_ordered_by_seed_first() -> None:
    text = "seeds: [3, 1]\ngrid: {axes: [{adapter.r: [8, 16]}]}"
    assert names(text) == ["r8-seed3", "r16-seed3", "r8-seed1", "r16-seed1"]
    assert [cell.config.seed for cell in cells(text)] == [3, 3, 1, 1]
    assert names("seeds: [0, 1]") == ["seed0", "seed1"]


def test_where_sizes_vary_each_seed_draws_rows_of_its_own() -> None:
    def drawn(text: str) -> list[int]:
        return [cell.config.data_seed for cell in cells(text)]

    sizes = "grid: {axes: [{data.size: [100, 200]}]}"
    assert drawn(f"seeds: [3, 1]\n{sizes}") == [3, 3, 1, 1]
    assert drawn(f"seeds: [3, 1]\ndata_seed: 7\n{sizes}") == [7, 7, 7, 7]
    assert drawn("seeds: [3, 1]\ngrid: {axes: [{adapter.r: [8, 16]}]}") == [0, 0, 0, 0]
    assert drawn(sizes) == [0, 0]


def test_cell_settings_are_values_not_their_spelling() -> None:
    (cell,) = cells("grid: {cells: [{training.learning_rate: 2e-4, adapter.r: '8'}]}")
    assert cell.settings == {"training.learning_rate": 0.0002, "adapter.r": 8}
    assert cell.name == "r8-lr0.0002"


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ("cells: [{adapter.r: 8}], axes: [{adapter.r: [8]}]", "give cells or axes, not both"),
        ("axes: [{adapter.r: [8, 16], data.size: [20]}]", "one axis need equally many values"),
        ("axes: [{}]", "an axis has no values"),
        ("axes: [{adapter.r: []}]", "an axis has no values"),
        ("axes: [{adapter.r: [8]}, {adapter.r: [16]}]", "keys in two axes"),
        ("axes: [{adapter.r: 8}]", "grid.axes.0.adapter.r = 8: must be a list"),
        ("cells: [{adapter.rr: 8}]", "grid cell 1: unknown key 'adapter.rr'; did you mean"),
        ("cells: [{seeds: [1]}]", "grid cell 1: unknown key 'seeds'; did you mean 'seed'?"),
        ("cells: [{adapter: {r: 8}}]", "grid cell 1: 'adapter' is a section; set a key of it"),
        ("cells: [{data.size: 20}, {data.size: 1}]", "grid cell 2: data.size = 1: must be greater"),
        ("cells: [{training.keep_best: true}]", "grid cell 1: training.keep_best = true: needs"),
        ("cells: [{adapter.r: 8}, {adapter.r: 8.0}]", "the cell r8 more than once"),
        ("cells: [{}, {}]", "the cell r8 more than once"),
        ("cells: [{adapter.r: 8}, {}]", "the cell r8 more than once"),
        ("cells: [{data.name: Q}, {data.name: q}]", "the cell nameQ more than once"),
        ("cells: [{data.name: a b}, {data.name: a_b}]", "the cell namea_b more than once"),
        ("cell: []", "unknown key 'grid.cell' (line 2); did you mean 'grid.cells'?"),
    ],
)
def test_invalid_grid_is_refused(grid: str, expected: str) -> None:
    errors = error_lines(f"name: x\ngrid: {{{grid}}}")
    assert expected in errors[0]
    assert all(line.startswith("my.yaml: ") for line in errors)


def test_conflicting_seeds_are_refused() -> None:
    assert "leave one out" in error_message(
        "seeds: [1, 2]\ngrid: {cells: [{seed: 3}, {adapter.r: 4}]}"
    )
    assert "r8-seed1 more than once" in error_message(
        "seeds: [1, 1]\ngrid: {cells: [{adapter.r: 8}]}"
    )


def test_errors_of_cells_are_reported_once() -> None:
    grid = "grid: {cells: [{adapter.r: 0}, {data.size: 1, adapter.r: x}]}\nseeds: [1, 2, 3]"
    assert [
        line.removeprefix("my.yaml: grid cell ") for line in error_lines(f"name: x\n{grid}")
    ] == [
        "1: adapter.r = 0: must be greater than or equal to 1",
        "2: data.size = 1: must be greater than or equal to 2",
        "2: adapter.r = x: must be a whole number",
    ]


def test_grid_above_the_limit_of_cells_is_refused() -> None:
    values = list(range(1, 501))
    keys = ["adapter.r", "seed", "data.size", "training.max_steps"]
    text = yaml.safe_dump({"grid": {"axes": [{key: values} for key in keys]}})
    assert f"at most {MAX_CELLS}" in error_message(text)


def test_cells_do_not_share_changed_sections() -> None:
    expanded = cells(
        "data: {columns: {category: topic}}\n"
        "grid: {cells: [{data.columns.response: answer}, {adapter.r: 4}]}"
    )
    assert expanded[0].config.data.columns == {"category": "topic", "response": "answer"}
    assert expanded[1].config.data.columns == {"category": "topic"}
    assert expanded[0].name == "responseanswer"


VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "adapter.r": st.integers(1, 64),
    "adapter.kind": st.sampled_from(["lora", "rslora", "dora"]),
    "data.size": st.one_of(st.none(), st.integers(2, 5000)),
    "data.name": st.text(min_size=1, max_size=300).filter(str.isprintable),
    "data.template": st.sampled_from(["chat", "../a b.jinja", "é.jinja", "a" * 400, "..", "\\n"]),
    "adapter.lora_alpha": st.sampled_from(["2r", "0.5r", 16, 0.25]),
    "adapter.target_modules": st.sampled_from(["all-linear", ["q_proj", "v_proj"], "k_proj"]),
    "training.learning_rate": st.floats(1e-9, 1.0, exclude_min=True),
    "training.keep_best": st.just(False),
    "data_seed": st.integers(0, 2**63 - 1),
}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=VALUES), min_size=1, max_size=5))
def test_cell_names_are_distinct_and_portable(listed: list[dict[str, Any]]) -> None:
    text = yaml.safe_dump({"name": "x", "grid": {"cells": listed}})
    try:
        _, expanded = read(text)
    except UsageError as error:
        refused = str(error)
        expanded = []
    if not expanded:
        assert all(line.endswith("more than once") for line in refused.split("\n"))
        return
    cell_names = [cell.name for cell in expanded]
    assert len({name.casefold() for name in cell_names}) == len(listed)
    for name in cell_names:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}", name)


# --- files -------------------------------------------------------------------------------------


def test_load_recipe_reads_a_file_and_names_it_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("\ufeffname: x\ndescription: Größe\n", encoding="utf-8")
    recipe, expanded = load_recipe(path, ["adapter.r=4"])
    assert (recipe.description, [cell.name for cell in expanded]) == ("Größe", ["r4"])
    path.write_text("name: X!\n")
    with pytest.raises(UsageError, match=r"^mine\.yaml: name = X!: must be .*\(line 1\)$"):
        load_recipe(path)


def test_missing_and_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: x")
    with pytest.raises(UsageError, match=r"no such recipe; did you mean .*mine\.yaml\?$"):
        load_recipe(tmp_path / "mime.yaml")
    with pytest.raises(UsageError, match=r"no such recipe$"):
        load_recipe(tmp_path / "none" / "mine.yaml")
    with pytest.raises(UsageError, match=r"cannot be read"):
        load_recipe(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read"):
        load_recipe(tmp_path / "a\0b")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UsageError, match=r"latin\.yaml: cannot be read .*utf-8"):
        load_recipe(tmp_path / "latin.yaml")


RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe, expanded = load_recipe(path)
    assert recipe.name == path.stem
    assert expanded


# --- arbitrary input ----------------------------------------------------------------------------


def assert_loads_or_explains(text: str, overrides: list[str]) -> None:
    """A recipe loads and can be serialised, or is refused with valid error lines."""
    try:
        recipe, expanded = parse_recipe(text, FILE, overrides)
    except UsageError as error:
        for line in str(error).split("\n"):
            assert line.startswith((f"{FILE}: ", "override: "))
            assert line.isprintable()
            assert len(line) < 500
    else:
        assert expanded
        for config in (recipe, *(cell.config for cell in expanded)):
            config.model_dump_json().encode()


KEYS = list(known_keys())
LAST = sorted({key.rsplit(".", 1)[-1] for key in KEYS})
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.just(2**70),
    st.floats(),
    st.dates(),
    st.datetimes(),
    st.binary(max_size=5),
    st.text(max_size=8).filter(lambda text: text.isprintable()),
    st.sampled_from(["2e-4", "2r", "all-linear", "lora", "auto", "nan", "x", 16, 1500, 0.5]),
)
ODD_KEYS = st.one_of(st.sampled_from([*KEYS, *LAST]), SCALARS)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(ODD_KEYS, inner, max_size=4),
    ),
    max_leaves=12,
)
SECTIONS = ["model", "data", "adapter", "training", "evaluation", "grid"]
RECIPE_TREES = st.fixed_dictionaries(
    {"name": st.sampled_from(["x", "ok", 3, None])},
    optional={
        **{s: st.one_of(TREES, st.dictionaries(st.sampled_from(LAST), TREES)) for s in SECTIONS},
        "seeds": st.one_of(TREES, st.lists(st.integers(-1, 3), max_size=3)),
        "grid": st.one_of(
            st.fixed_dictionaries(
                {"cells": st.lists(st.dictionaries(st.sampled_from(KEYS), TREES), max_size=3)}
            ),
            st.fixed_dictionaries(
                {
                    "axes": st.lists(
                        st.dictionaries(st.sampled_from(KEYS), st.lists(SCALARS, max_size=3)),
                        max_size=3,
                    )
                }
            ),
        ),
    },
)
NEARLY_RIGHT = st.fixed_dictionaries(
    {"name": st.just("x")},
    optional={
        "seeds": st.lists(st.integers(0, 9), max_size=3, unique=True),
        "data": st.fixed_dictionaries(
            {}, optional={"columns": st.dictionaries(st.text(max_size=5), st.text(max_size=5))}
        ),
        "grid": st.fixed_dictionaries(
            {"cells": st.lists(st.fixed_dictionaries({}, optional=VALUES), max_size=2)}
        ),
    },
)
PIECES = st.sampled_from(
    [
        *("name: x\n", "data:\n", "  size: 30\n", "seeds: ", "grid:\n", "  cells: ", "adapter: "),
        *("&a ", "*a", "<<: ", "? ", ": ", "- ", "[", "]", "{", "}", ", ", "\n", "  ", "| ", "> "),
        *("!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!omap "),
        *("!!merge ", "!!null ", "!!pairs ", "!!python/object:os.system ", "!x ", "!<%0A> "),
        *(
            "0x" + "f" * 5000,
            "2024-13-45",
            "9999-12-31T23:59:59-23:59",
            "190:20:30",
            ".nan",
            "=",
            "~",
        ),
        *(
            '"\\ud800"',
            '"\\0"',
            "'",
            '"',
            "# ",
            "---\n",
            "...\n",
            "%YAML 1.3\n",
            "\ufeff",
            "\t",
            "\0",
        ),
    ]
)
OVERRIDES = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.builds(
            lambda key, value: f"{key}={value}",
            st.one_of(
                st.sampled_from([*KEYS, *LAST, "", ".", "..", "a..b", "data.columns.x", "name.x"]),
                st.text(".=abr", max_size=6),
            ),
            st.one_of(st.lists(PIECES, max_size=4).map("".join), st.text(max_size=6)),
        ),
    ),
    max_size=3,
)
NESTED = "[" * 1500
BOMB = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{{', '.join(f'k{n}: *{a}' for n in range(9))}}}\n"
    for a, b in itertools.pairwise("abcdefghij")
)
LIST_BOMB = "a: &a [1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join)), OVERRIDES)
@example(NESTED, [])
@example("{a: " * 1500, [])
@example("name: x", [f"data.size={NESTED}"])
@example("name: &x {a: *x}\ndata: *x\ngrid: {cells: [*x], axes: *x}", ["seeds=&x [*x]"])
@example("name: x\ngrid: {cells: &x [{data.size: *x}]}", [])
@example("name: x\n<<: &x {<<: *x}", [])
@example('name: x\ngrid: {cells: [{data.name: !!binary gIGC}, {data.name: "\\ud800"}]}', [])
@example(BOMB + "data: *j\nseeds: *j", [])
@example(LIST_BOMB + "seeds: *j\ndata: {name: *j}\ngrid: {axes: *j, cells: [*j]}", [])
@example(f"!!{'0' * 600}", [])
@example("1: 1\nnull: 2\n2024-01-01: 3\n[1]: 4\n? {a: b}\n: 5\n.nan: 6\n.nan: 7", [])
def test_any_recipe_text_loads_or_is_explained(text: str, overrides: list[str]) -> None:
    assert_loads_or_explains(text, overrides)
    assert_loads_or_explains(f"name: x\n{text}", overrides)


@settings(max_examples=200, deadline=None)
@given(st.one_of(RECIPE_TREES, NEARLY_RIGHT), OVERRIDES)
def test_any_recipe_tree_loads_or_is_explained(tree: dict[str, Any], overrides: list[str]) -> None:
    assert_loads_or_explains(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), overrides)


def test_null_columns_and_include_context_values_are_kept() -> None:
    recipe, _ = parse_recipe(
        "name: x\ndata: {columns: {category: null, response: a}}\n", "x.yaml",
        ["data.columns.group=null"],
    )  # fmt: skip
    assert recipe.data.columns == {"category": None, "response": "a", "group": None}
    assert recipe.data.include_context == "auto"
    for value in (True, False, "auto"):
        data = DataSection(include_context=value)
        assert data.include_context is value
    with pytest.raises(UsageError, match=r"data\.include_context"):
        parse_recipe("name: x\ndata: {include_context: sometimes}\n", "x.yaml")


def test_recipe_records_without_later_keys_keep_their_meaning() -> None:
    then = {"data": {"name": "rows.jsonl", "include_context": False}}
    now = {**LATER_KEYS, "data": {**then["data"], **LATER_KEYS["data"]}}
    assert differences({"recipe": then}, {"recipe": now}) == []
    now["data"]["include_context"] = True
    assert differences({"recipe": then}, {"recipe": now}) == ["data.include_context: False → True"]


def test_group_by_is_an_unordered_set() -> None:
    def group_by(*overrides: str) -> object:
        return read("name: x", *overrides)[1][0].config.data.group_by

    assert group_by() == ("group", "prompt", "context", "near")
    assert group_by("data.group_by=near") == ("near",)
    assert group_by("data.group_by=[near, group]") == ("group", "near")
    assert group_by("data.group_by=[]") == ()


def test_override_of_a_tuned_key_is_refused_as_it_has_no_effect() -> None:
    text = "name: x\ntuning: {values: [1e-3, 1e-2]}\n"
    with pytest.raises(UsageError, match="learning_rate has no effect: tuning chooses it"):
        parse_recipe(text, "x.yaml", ["training.learning_rate=1e-3"])


def test_sets_drawn_for_tuning_hold_the_groups_that_intervals_need() -> None:
    from slm_lora.data import split_sizes
    from slm_lora.stats import inference

    assert split_sizes.LEAST_GROUPS == inference.LEAST_GROUPS


ALSO = "name: x\nforgetting: {also: {german: {name: g.jsonl}}}\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("forgetting.also.german.margin=0", "forgetting.also.german.margin = 0: must be greater"),
        ("forgetting.also.german.rowz=1", "unknown key 'forgetting.also.german.rowz'"),
        ("forgetting.also.french.rows=3", "'forgetting.also.french.name' is missing"),
        ("forgetting.also.german=5", "forgetting.also.german = 5: must be a mapping"),
        ("forgetting=5", "'forgetting' is a section; set a key of it, such as 'forgetting.also'"),
    ],
)
def test_key_of_a_section_under_a_name_of_its_own_is_refused(override: str, message: str) -> None:
    (line,) = error_lines(ALSO, override)
    assert message in line


def test_key_of_a_section_under_a_name_of_its_own_is_set() -> None:
    recipe, _ = read(ALSO, "forgetting.also.german.margin=0.2", "forgetting.also.it.name=it.csv")
    assert recipe.forgetting is not None
    assert recipe.forgetting.also["german"].margin == 0.2
    assert recipe.forgetting.also["it"].name == "it.csv"
    assert recipe.forgetting.drift
