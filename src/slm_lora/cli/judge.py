"""The command `judge`: a model behind an API compares replies of adapters with the base's."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.cli.options import console
from slm_lora.errors import UsageError


def judge(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results/<experiment>")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the section `judge`, e.g. url=http://localhost:8000/v1 "
            "model=qwen3-32b rows=50; with --recipe also others of it, e.g. data.name=rows.jsonl.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="RECIPE",
            help="The experiment's recipe: its section `judge` has the defaults, its `data.name` "
            "the rows. Needed if the rows are in a file.",
        ),
    ] = None,
    send: Annotated[
        bool, typer.Option("--send", help="Send the requests. Without it nothing is sent.")
    ] = False,
) -> None:
    """Let a model compare the replies of every adapter with the base's.

    Prints the number of requests, their tokens and costs; with --send sends them to an
    OpenAI-style API, writes the answers beside the runs, and rebuilds the report. Interrupted, the
    same command continues.
    """
    from slm_lora.experiment.judge import plan_judge
    from slm_lora.report.judge import judge_lines
    from slm_lora.report.write import write_report
    from slm_lora.runs.folder import list_runs
    from slm_lora.runtime.progress import Reporter

    runs = list_runs(results)
    section, data = _section(recipe, overrides or [])
    plan = plan_judge(section, results, runs, data)
    out = console()
    out.print(plan.estimate(), soft_wrap=True)
    if not send:
        words = [str(results), *(overrides or []), *(["--recipe", str(recipe)] if recipe else [])]
        command = shlex.join(["slm-lora", "judge", *words, "--send"])
        out.print(f"nothing was sent; to send them: {command}", soft_wrap=True)
        return
    plan.run(Reporter())
    analysis = write_report(runs, results)
    for line in judge_lines(analysis.runs, results):
        out.print(line, soft_wrap=True)


def _section(recipe: Path | None, overrides: list[str]) -> tuple[Any, Any]:
    """The section of the recipe with overrides, and its section `data`; None without a recipe.

    Raises:
        UsageError: a key is missing, unknown or invalid, or the recipe is.
    """
    import yaml
    from pydantic import ValidationError

    from slm_lora.config.judge import JudgeSection
    from slm_lora.config.load import load_recipe
    from slm_lora.config.schema import Recipe

    keys: dict[str, Any] = {}
    of_recipe: list[str] = []
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.removeprefix("judge.")
        if name not in JudgeSection.model_fields and ("." in name or name in Recipe.model_fields):
            of_recipe.append(override)
            continue
        try:
            keys[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UsageError(f"{override}: must be KEY=VALUE, e.g. model=qwen3-32b")
    data = None
    if recipe is not None:
        parsed_recipe, cells = load_recipe(recipe, of_recipe)
        data = cells[0].config.data
        if parsed_recipe.judge is not None:
            keys = parsed_recipe.judge.model_dump(mode="json", exclude_unset=True) | keys
    elif of_recipe:
        raise UsageError(f"{of_recipe[0]}: needs --recipe RECIPE")
    try:
        return JudgeSection.model_validate(keys), data
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UsageError(
                f"judge.{name}: missing; give {name}=… or set it in the recipe"
            ) from None
        raise UsageError(f"judge.{name}: {first['msg'].removeprefix('Value error, ')}") from None
