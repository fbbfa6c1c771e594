"""Commands that export trained folders: merge, export gguf, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slm_lora.cli.options import ResultsDir, console, quiet_libraries

TrainedArgument = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="adapter/<experiment>-<cell>")
]
TargetArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; new or empty.")]
BaseFolder = Annotated[
    Path | None,
    typer.Option("--base", help="Folder of the base, if its recorded name does not resolve."),
]


def merge(
    folder: TrainedArgument,
    out: TargetArgument,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option("--dtype", help="Data type of the merged weights."),
    ] = "fp32",
    base: BaseFolder = None,
) -> None:
    """Merge an adapter into its base.

    Writes a plain transformers model. Weights are merged in fp32, then cast. A new process compares
    the logits on 80 prompts with those of base+adapter and of the base; if the comparison fails,
    nothing is written.
    """
    from slm_lora.export.merge import merge as merge_adapter
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    trained = read_trained(folder)
    verification = merge_adapter(trained, out, dtype, base, Reporter())
    console().print(f"{out}\n{verification.summary()}", soft_wrap=True)
    if quantization := trained.metadata["base"].get("quantization"):
        console().print(
            f"note: trained on {trained.base_name} in {quantization}, merged into the unquantised "
            "weights: losses differ from those of the training by the quantisation error",
            soft_wrap=True,
        )


def export_gguf(
    folder: TrainedArgument,
    out: TargetArgument,
    layout: Annotated[
        Literal["merged", "adapter"],
        typer.Option("--as", help="For an adapter: one merged model, or base and adapter."),
    ] = "merged",
    file_type: Annotated[
        Literal["f32", "f16", "q8_0"],
        typer.Option("--type", help="Data type of the model's weights."),
    ] = "f16",
    base: BaseFolder = None,
) -> None:
    """Write GGUF files for llama.cpp and a Modelfile for Ollama.

    Supports the Llama family. The model file includes tokenizer, special tokens and chat template.
    """
    from slm_lora.export.llama_cpp import export
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    for path in export(read_trained(folder), out, layout, file_type, base, Reporter()):
        console().print(f"{path}", soft_wrap=True)


def push(
    folder: TrainedArgument,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name")],
    private: Annotated[
        bool, typer.Option("--private", help="Create a new repository as private.")
    ] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run", metavar="DIR", help="Write the files to DIR instead of sending them."
        ),
    ] = None,
    results: ResultsDir = Path("results"),
) -> None:
    """Push an adapter or a merged model to the hub.

    The model card is generated from its run.
    """
    from slm_lora.export import hub
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    quiet_libraries()
    reporter = Reporter()
    reporter.info(f"  reading {folder} and generating the model card")
    trained = read_trained(folder)
    if dry_run is None:
        url = hub.push(trained, repository, results, private=private, reporter=reporter)
        console().print(url, soft_wrap=True)
        return
    for path in hub.dry_run(trained, repository, results, dry_run):
        console().print(f"{path}", soft_wrap=True)
