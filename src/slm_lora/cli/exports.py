"""Commands that hand trained adapters over to other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slm_lora.cli.options import ResultsDir, console, quiet_libraries

Trained = Annotated[Path, typer.Argument(metavar="FOLDER", help="adapter/<experiment>-<cell>")]
Target = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")]
BasePlace = Annotated[
    Path | None,
    typer.Option("--base", help="Folder of the base, where its name does not lead there."),
]


def merge(
    folder: Trained,
    out: Target,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--dtype", help="Of the merged weights.")
    ] = "fp32",
    base: BasePlace = None,
) -> None:
    """Merge an adapter into its base: a model that plain transformers loads.

    Merged in fp32 and then cast. A fresh process compares its logits with base+adapter's on 80
    prompts, and with the base's alone; if that fails, nothing is written.
    """
    from slm_lora.export.merge import merge as merge_adapter
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    trained = read_trained(folder)
    proof = merge_adapter(trained, out, dtype, base, Reporter())
    console().print(f"{out}\n{proof.summary()}", soft_wrap=True)
    if quantization := trained.metadata["base"].get("quantization"):
        console().print(
            f"It was trained on {trained.base_name} in {quantization}, and is merged into the "
            "unquantised weights: losses differ from those of the training by what that rounded.",
            soft_wrap=True,
        )


def export_gguf(
    folder: Trained,
    out: Target,
    form: Annotated[
        Literal["merged", "adapter"],
        typer.Option("--as", help="Of an adapter: one merged model, or base and adapter."),
    ] = "merged",
    kind: Annotated[
        Literal["f32", "f16", "q8_0"], typer.Option("--type", help="Of the model's weights.")
    ] = "f16",
    base: BasePlace = None,
) -> None:
    """Write GGUF files for llama.cpp, and a Modelfile for Ollama beside them.

    The Llama family only; tokenizer, chat template and special tokens are in the model's file.
    """
    from slm_lora.export.llama_cpp import export
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    for path in export(read_trained(folder), out, form, kind, base, Reporter()):
        console().print(f"{path}", soft_wrap=True)


def push(
    folder: Trained,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository a private one.")
    ] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option("--dry-run", metavar="DIR", help="Write what would be sent; send nothing."),
    ] = None,
    results: ResultsDir = Path("results"),
) -> None:
    """Push an adapter or a merged model to the hub, with a model card made from its run."""
    from slm_lora.export import hub
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    reporter = Reporter()
    reporter.info(f"  reading {folder}, and writing its card from its run")
    trained = read_trained(folder)
    if dry_run is None:
        url = hub.push(trained, repository, results, private=private, reporter=reporter)
        console().print(url, soft_wrap=True)
        return
    for path in hub.dry_run(trained, repository, results, dry_run):
        console().print(f"{path}", soft_wrap=True)
