"""The command ``slm-lora``. Thin: it parses, calls, and explains errors; heavy libraries are
imported inside the commands, so that ``--help`` is instant."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from slm_lora import __version__
from slm_lora.cli import compare, data, experiments, exports, models, outputs, serving
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
    experiments.experiment,
    experiments.train,
    experiments.evaluate,
    experiments.report,
    compare.compare,
    outputs.chat,
    outputs.generate,
    outputs.compare_outputs,
    serving.serve,
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

export_app = typer.Typer(help="Write what other programs read.", no_args_is_help=True)
export_app.command("gguf")(exports.export_gguf)
app.add_typer(export_app, name="export")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"slm-lora {__version__}")


def _version_asked(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version_asked, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Controlled LoRA experiments on small language models: which differences are real."""


def main() -> None:
    """Entry point: errors become one line and an exit code, Ctrl-C a resumable stop."""
    terminal.make_safe()
    # A scheduler's request to stop is Ctrl-C by another name.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    local.watch_starter()
    hardware.collect_garbage_rarely()
    try:
        code = run_guarded(lambda: app(standalone_mode=False))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"a bug of ours: {type(error).__name__}: {reason}; please report it, with "
            f"what was asked for and these lines (slm-lora {__version__}):",
            file=sys.stderr,
        )
        traceback.print_exception(error)
        code = 1
    sys.exit(code)


_TYPER_INTERRUPTED = 130
"""What typer makes of Ctrl-C, instead of letting it through."""


def run_guarded(command: Callable[[], object]) -> int:
    """Run a command and return its exit code; errors are printed in one line."""
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
        if not terminal.nobody_reads(error):
            raise
        terminal.stop_writing()
        return terminal.BROKEN_PIPE
    except Exception as error:
        # Click's own usage errors know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            return int(error.exit_code)
        # torch's own (a RuntimeError) by name, as torch may not even be loaded.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            print(
                "out of memory; lower training.micro_batch_tokens and "
                "evaluation.micro_batch_tokens, or data.max_length",
                file=sys.stderr,
            )
            return StorageError.exit_code
        if isinstance(error, OSError) and error.errno in _STORAGE:
            where = f"{error.filename}: " if error.filename else ""
            print(f"{where}{error.strerror}; make room, or choose another folder", file=sys.stderr)
            return StorageError.exit_code
        raise


_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES}
"""Failures that can come wherever anything is read or written."""
