"""The section `tasks` of a recipe: standard tasks through lm-evaluation-harness."""

from __future__ import annotations

from pydantic import Field, field_validator

from slm_lora.config.types import Int, Section


class TasksSection(Section):
    """Standard tasks through lm-evaluation-harness, see docs/tasks.md; changes no training."""

    names: tuple[str, ...] = Field(
        description="Tasks, groups and tags of lm-eval, task files (`.yaml`), and folders of task "
        "files (needs the extra `tasks`)."
    )
    limit: Int | None = Field(
        None, ge=1, description="Documents per task, its first ones; null: all."
    )
    num_fewshot: Int | None = Field(
        None,
        ge=0,
        description="Examples before each question; null: as the task says. Tasks that set 0 keep "
        "it.",
    )
    training_template: bool = Field(
        False, description="Put questions into the training template, as lm-eval's chat template."
    )

    @field_validator("names")
    @classmethod
    def _are_different(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(name.strip() for name in value):
            raise ValueError("needs at least one task, and no empty name")
        if len(set(value)) < len(value):
            raise ValueError("names a task twice")
        return value
