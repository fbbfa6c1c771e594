"""The command that serves a base and its adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slm_lora.cli.options import AdaptersDir, ResultsDir, console
from slm_lora.cli.outputs import BaseModel, Device, Precision, opened
from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from slm_lora.data.prompts import Prompt


def serve(
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            help="Adapter folder; may be repeated. Unset: all of the experiment trained last.",
        ),
    ] = None,
    adapters: AdaptersDir = Path("adapter"),
    base: BaseModel = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 7860,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name under which others reach this server."),
    ] = None,
    page: Annotated[bool, typer.Option(help="The page at /, besides the API at /v1.")] = True,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="The page's examples; else rows of the data set, where it is on this machine.",
        ),
    ] = None,
    results: ResultsDir = Path("results"),
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest reply, in tokens.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; more: 429.")] = 64,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve a page and an OpenAI-style API: the base and its adapters, loaded once.

    Without --adapter: all adapters of the experiment that was trained last.
    """
    import os
    import secrets

    from slm_lora.data.prompts import read_prompts

    try:
        from slm_lora.serve.api import make_app
        from slm_lora.serve.engine import Engine
        from slm_lora.serve.guard import LOOPBACK, Guard
        from slm_lora.serve.server import listen
        from slm_lora.serve.server import serve as run

        if page:
            import gradio  # noqa: F401

            from slm_lora.serve.page import mount_page
    except ImportError as error:
        raise UsageError(
            f"serve needs {error.name}, which is not installed: pip install '.[serve]' in a "
            "checkout"
        ) from error
    chosen = list(adapter or last_experiment(adapters))
    examples = read_prompts(prompts) if prompts else _dataset_examples(chosen) if page else []
    listener = listen(host, port)
    variants = opened(base, chosen, device, precision)
    engine = Engine(variants, max_tokens=max_tokens, max_waiting=max_waiting)
    app = make_app(engine)
    if page:
        app = mount_page(app, engine, examples, best_adapter(chosen, results))
    outside = host not in LOOPBACK and host != "::1"
    token = os.environ.get("SLM_LORA_TOKEN") or (secrets.token_urlsafe(24) if outside else None)
    shown = f"[{host}]" if ":" in host else host
    hosts = {*LOOPBACK, shown.lower(), *(name.lower() for name in allow_host or ())}
    bound_port = listener.getsockname()[1]
    out = console()
    for name in variants.names:
        out.print(f"model     {name}", soft_wrap=True)
    url = f"http://{shown}:{bound_port}"
    if page:
        out.print(f"page      {url}/" + (f"?token={token}" if token else ""), soft_wrap=True)
    out.print(f"API       {url}/v1" + (f"   key {token}" if token else ""), soft_wrap=True)
    out.print("Ctrl-C ends it")
    try:
        run(Guard(app, hosts=hosts, token=token), listener)
    finally:
        engine.close()


def last_experiment(adapters: Path) -> list[Path]:
    """The adapters of the experiment that the newest adapter belongs to."""
    files = sorted(adapters.glob("*/slm_lora.json"), key=lambda file: file.stat().st_mtime)
    found: dict[Path, tuple[str, str]] = {}
    for file in files:
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            found[file.parent] = about["experiment"], about["base"]["sha256"]
        except (ValueError, KeyError, TypeError):
            continue
    usable = {
        folder: of for folder, of in found.items() if (folder / "adapter_config.json").is_file()
    }
    if not usable:
        raise UsageError(
            f"{adapters}: no adapter in it; train one (make experiment), or name one (--adapter)"
        )
    newest = list(usable.values())[-1]
    return [folder for folder, of in usable.items() if of == newest]


def best_adapter(adapters: list[Path], results: Path) -> str | None:
    """Name of the adapter with the lowest held-out loss, where the losses of all that have one are
    of the same tokens; None where that is not known."""
    found: dict[str, float] = {}
    scored_on = set()
    for folder in adapters:
        try:
            about = json.loads((folder / "slm_lora.json").read_text(encoding="utf-8"))
            place = results / about["experiment"] / "runs" / f"{about['cell']}-{about['run'][:8]}"
            run = json.loads((place / "run.json").read_text(encoding="utf-8"))
            headline = run["evaluation"]["headline"]
            if run["hash"] == about["run"]:
                found[folder.resolve().name] = float(run["evaluation"][headline]["loss"])
                scored_on.add((run["data"]["held_out_sha256"], run["model"]["sha256"], headline))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(found, key=found.__getitem__) if len(scored_on) == 1 else None


def _dataset_examples(adapters: list[Path]) -> list[Prompt]:
    """A few rows of what the first adapter was trained on, where it is on this machine."""
    from slm_lora.adapters.io import ABOUT
    from slm_lora.config.schema import DataSection
    from slm_lora.data.prompts import from_rows
    from slm_lora.data.sources import read_rows
    from slm_lora.errors import SlmLoraError

    try:
        about = json.loads((adapters[0] / ABOUT).read_text(encoding="utf-8"))
        section = DataSection(**about["recipe"]["data"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []
    # Nothing is fetched for the sake of examples; of a local file the recipe keeps the name.
    if section.name != "ml-qa" and not Path(section.name).is_file():
        return []
    try:
        return from_rows(read_rows(section).rows, 12)
    except SlmLoraError:
        return []
