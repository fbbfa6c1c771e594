"""Write docs/recipe.md from the schema, or check that it is up to date (--check)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from slm_lora.config.forgetting import AlsoSection
from slm_lora.config.schema import Recipe
from slm_lora.config.validation import section_of

TARGET = Path(__file__).parent / "recipe.md"
HEAD = """# Recipe reference

One YAML file describes an experiment. This page is generated from the schema
(`python docs/make_recipe_reference.py`); names are those of PEFT and TRL where they have one.
Every key can be overridden on the command line by its dotted name: `adapter.r=16`.

"""


def sections() -> Iterator[tuple[str, str, type[BaseModel]]]:
    """Title, dotted prefix and schema of every section; the top level first."""
    yield "Top level", "", Recipe
    for name, info in Recipe.model_fields.items():
        if (section := section_of(info)) is not None:
            yield f"`{name}`", f"{name}.", section
    yield "`forgetting.also`: keys of each set", "", AlsoSection


def default(info: Any) -> str:
    """The default as YAML writes it."""
    if info.is_required():
        return "required"
    value = info.default
    if value is PydanticUndefined:
        value = info.default_factory()
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if value not in ("", {}) else "empty"


def allowed(annotation: Any) -> str:
    """The values of a key that has a few only, as a sentence."""
    kinds = [annotation, *get_args(annotation)]
    values = [value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    named = ", ".join(f"`{value}`" for value in values)
    return f" Values: {named}." if len(values) > 1 else ""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, prefix, model in sections():
        parts.append(f"## {title}\n\n{(model.__doc__ or '').strip()}\n\n")
        parts.append("| Key | Default | Meaning |\n| :-- | :-- | :-- |\n")
        for name, info in model.model_fields.items():
            if section_of(info) is not None:
                continue
            meaning = (info.description or "").replace("|", "\\|") + allowed(info.annotation)
            parts.append(f"| `{prefix}{name}` | {default(info)} | {meaning} |\n")
        parts.append("\n")
    parts.append(TAIL)
    return "".join(parts)


TAIL = """## Grids

Cells can be listed, or be the product of axes; keys within one axis move together:

```yaml
grid:
  cells:
    - {data.size: 1500, adapter.r: 8}
    - {data.size: 3000, adapter.r: 16}
```

```yaml
grid:
  axes:
    - {adapter.r: [8, 16], adapter.lora_alpha: [16, 16]}   # two settings, alpha fixed
    - {data.size: [1500, 3000]}                            # times two sizes
seeds: [0, 1, 2]                                           # times three seeds
```

A multiple of the rank, such as `lora_alpha: 2r` (the default), follows the rank by itself.
"""

TAIL += """
## Learning rate

`training.learning_rate: auto` (the default) is a number from published rules, computed when the
model is known; runs record the number, and `--plan` prints it with its inputs:

```
LoRA:             5e-5 × (2000 / width)^p × 10 × √(32 / alpha) × √(effective_batch_size / 16)
full fine-tuning: 5e-5 × (2000 / width)^p × √(effective_batch_size / 16)
```

rounded to two digits. `width` is the model's `hidden_size`; p is 0.781 for Llama (`model_type`
begins with `llama`, as SmolLM2's), 0.0775 for Qwen and 0.5 for others. With the embedded model and
`lora_alpha: 2r`:

| rank | 4 | 8 | 16 | 64 | full |
| :-- | --: | --: | --: | --: | --: |
| learning rate | 0.0026 | 0.0019 | 0.0013 | 0.00066 | 0.00013 |

- Base rate, factor 10, width and p: [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)
  (2025) and the [tinker-cookbook](https://github.com/thinking-machines-lab/tinker-cookbook),
  measured at alpha = 32 on larger models. p = 0.5 is the exponent of width in the next source.
- √(32 / alpha): [Learning Rate Scaling across LoRA Ranks](https://arxiv.org/abs/2602.06204) (2026):
  the rate falls as 1/√r at a constant scale alpha/r, and does not depend on r at a constant alpha.
  For rsLoRA alpha·√r takes the place of alpha.
- √batch: [Malladi et al. 2022](https://arxiv.org/abs/2205.10287). The cookbook states no batch size
  for its formula; 16 is an assumption.
- LoRA+: A's rate is divided by the root of `loraplus_lr_ratio`. PiSSA has no term, though
  [its best rate is below LoRA's](https://arxiv.org/abs/2602.04998).

It is a starting point, not a tuned value: the best rate also depends on rows, steps and schedule.
In [results/learning-rates](../results/learning-rates/report.md) 3e-3 had the lowest loss of four
rates, at rank 4 and at rank 16. A `tuning` section chooses the rate on the validation set. By
default it begins with three values of the series …, 2.5e-4, 1e-3, 4e-3, 1.6e-2, …, the middle one
next to the rule's rate: settings with different rates then have values in common, at which they can
be compared as well.
"""


def main() -> None:
    """Write, or with --check compare."""
    if "--check" in sys.argv[1:]:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page():
            sys.exit(f"{TARGET} is not up to date: run python docs/make_recipe_reference.py")
        return
    TARGET.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
