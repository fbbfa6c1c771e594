"""The command ``slm-lora``: argument parsing and error messages.

Commands import heavy libraries in their bodies, so that ``--help`` starts immediately.
"""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from slm_lora import __version__
from slm_lora.cli import (
    compare,
    data,
    experiments,
    exports,
    judge,
    models,
    outputs,
    serving,
    tune,
    verdict,
)
from slm_lora.errors import STOPPED_RESUMABLE, SlmLoraError, StorageError
from slm_lora.launch import local
from slm_lora.runtime import hardware, terminal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    tune.tune,
    tune.init,
    experiments.experiment,
    experiments.train,
    experiments.evaluate,
    experiments.report,
    compare.compare,
    judge.judge,
    verdict.verdict,
    outputs.chat,
    outputs.generate,
    outputs.compare_outputs,
    serving.serve,
    serving.watch,
    exports.merge,
    exports.push,
):
    app.command()(command)

data_app = typer.Typer(help="Build, show and check data sets.", no_args_is_help=True)
data_app.command("build")(data.build)
data_app.command("show")(data.show)
data_app.command("check")(data.check)
app.add_typer(data_app, name="data")

models_app = typer.Typer(help="List and fetch embedded models.", no_args_is_help=True)
models_app.command("list")(models.list_models)
models_app.command("fetch")(models.fetch_model)
app.add_typer(models_app, name="models")

export_app = typer.Typer(help="Export to formats of other programs.", no_args_is_help=True)
export_app.command("gguf")(exports.export_gguf)
app.add_typer(export_app, name="export")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"slm-lora {__version__}")


def _print_version(requested: bool) -> None:
    if requested:
        version()
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Controlled LoRA experiments on small language models: which differences are real."""


def main() -> None:
    """Entry point: errors become one line and an exit code, Ctrl-C a resumable stop."""
    terminal.configure_streams()
    # Schedulers stop jobs with SIGTERM; treat it like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    local.watch_parent()
    hardware.reduce_gc_frequency()
    try:
        code = run_guarded(lambda: app(standalone_mode=False))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"internal error: {type(error).__name__}: {reason}; please report it with the "
            f"command and this traceback (slm-lora {__version__}):",
            file=sys.stderr,
        )
        traceback.print_exception(error)
        code = 1
    sys.exit(code)


_TYPER_INTERRUPTED = 130
"""Exit code that typer returns on Ctrl-C instead of raising KeyboardInterrupt."""


def run_guarded(command: Callable[[], object]) -> int:
    """Run a command, print its errors in one line each, and return the exit code."""
    try:
        result = command()
        sys.stdout.flush()
        if result == _TYPER_INTERRUPTED:
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except SlmLoraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command continues where it stopped", file=sys.stderr)
        return STOPPED_RESUMABLE
    except (SystemExit, BrokenPipeError) as error:
        if not terminal.is_broken_pipe(error):
            raise
        terminal.discard_output()
        return terminal.BROKEN_PIPE
    except Exception as error:
        # Click's usage errors print themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        # torch.OutOfMemoryError by name, because torch may not be imported.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print(
                "out of memory; lower training.micro_batch_tokens and "
                "evaluation.micro_batch_tokens, or data.max_length",
                file=sys.stderr,
            )
            return StorageError.exit_code
        if isinstance(error, OSError) and error.errno in _STORAGE_ERRNOS:
            prefix = f"{error.filename}: " if error.filename else ""
            print(
                f"{prefix}{error.strerror}; free space or choose another folder",
                file=sys.stderr,
            )
            return StorageError.exit_code
        raise


_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES}
"""Errors of the file system, reported with the exit code of `StorageError`."""
