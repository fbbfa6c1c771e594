"""Commands that export trained folders: merge, export gguf, push."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer

from slm_lora.cli.options import JsonOutput, ResultsDir, console, quiet_libraries
from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from slm_lora.export.gguf import FileType

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
    type_name: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="[f32|f16|q8_0|q6_k|q5_k_m|q4_k_m]",
            help="Data type of the model's weights.",
        ),
    ] = "f16",
    base: BaseFolder = None,
    score: Annotated[
        Path | None,
        typer.Option(
            "--score",
            metavar="RECIPE",
            help="Also score the file through llama.cpp on the test rows of this recipe, paired "
            "with FOLDER in PyTorch.",
        ),
    ] = None,
    as_json: JsonOutput = False,
) -> None:
    """Write GGUF files for llama.cpp and a Modelfile for Ollama.

    Supports the Llama family. The model file includes tokenizer, special tokens and chat template.
    """
    from slm_lora.cli.gguf_files import check_llama_cpp, export_job, print_files, score_export
    from slm_lora.export.llama_cpp import export
    from slm_lora.export.trained import read_trained
    from slm_lora.runtime.progress import Reporter

    file_type = _file_type(type_name)
    if as_json and score is None:
        raise UsageError("--json: needs --score RECIPE")
    if score is not None and layout == "adapter":
        raise UsageError("--score: scores the file of a whole model; use --as merged")
    quiet_libraries()
    reporter, trained = Reporter(), read_trained(folder)
    if score is not None:
        check_llama_cpp()
        job = export_job(score, trained)
    paths = export(trained, out, layout, file_type, base, reporter)
    if not as_json:
        for path in paths:
            console().print(f"{path}", soft_wrap=True)
    if score is not None:
        files = [path for path in paths if path.suffix == ".gguf"]
        print_files(score_export(job, trained, files, reporter), as_json)


def _file_type(name: str) -> FileType:
    """Check the value of --type.

    Raises:
        UsageError: no type, or one that only llama.cpp's own quantiser writes.
    """
    from slm_lora.export.gguf import FileType

    if name in get_args(FileType):
        return cast("FileType", name)
    if re.fullmatch(r"i?q\d\w*", name, re.IGNORECASE):
        raise UsageError(
            f"--type {name}: not written here ({', '.join(get_args(FileType))} are); export "
            f"--type f16, run llama-quantize FILE.gguf OUT.gguf {name.upper()}, and score the "
            "result with slm-lora evaluate RECIPE --adapter FOLDER --gguf OUT.gguf"
        )
    raise UsageError(f"--type {name}: choose {', '.join(get_args(FileType))}")


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
