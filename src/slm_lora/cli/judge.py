"""The command `judge`: a model behind an API compares replies of adapters with the base's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from slm_lora.cli.options import console
from slm_lora.errors import IntegrityError, UsageError


def judge(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results/<experiment>")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Keys of the recipe's section `judge`, e.g. url=http://localhost:8000/v1 "
            "model=qwen3-32b rows=50.",
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
    plan = plan_judge(_section(results, overrides or []), results, runs)
    out = console()
    out.print(plan.estimate(), soft_wrap=True)
    if not send:
        command = shlex.join(["slm-lora", "judge", str(results), *(overrides or []), "--send"])
        out.print(f"nothing was sent; to send them: {command}", soft_wrap=True)
        return
    plan.run(Reporter())
    analysis = write_report(runs, results)
    for line in judge_lines(analysis.runs, results):
        out.print(line, soft_wrap=True)


def _section(results: Path, overrides: list[str]) -> Any:
    """The section of the recipe with overrides.

    Raises:
        UsageError: a key is missing, unknown or invalid.
        IntegrityError: the file of the section is broken.
    """
    import yaml
    from pydantic import ValidationError

    from slm_lora.config.judge import JudgeSection
    from slm_lora.runs.judge import JUDGE_SECTION_FILE

    path = results / JUDGE_SECTION_FILE
    keys: dict[str, Any] = {}
    if path.is_file():
        try:
            keys = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise IntegrityError(f"{path}: broken ({error}); remove it") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        try:
            keys[key.removeprefix("judge.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UsageError(f"{override}: must be KEY=VALUE, e.g. model=qwen3-32b")
    try:
        return JudgeSection.model_validate(keys)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise UsageError(
                f"judge.{name}: missing; give {name}=… or set it in the recipe"
            ) from None
        raise UsageError(f"judge.{name}: {first['msg'].removeprefix('Value error, ')}") from None
