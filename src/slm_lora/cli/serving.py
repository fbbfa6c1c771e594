"""The commands `serve` and `watch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from slm_lora.cli.options import AdaptersDir, ResultsDir, console
from slm_lora.cli.outputs import BaseModel, Device, Precision, load_models
from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from slm_lora.data.prompts import Prompt

AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", help="Additional host name of this server; repeatable."),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on; other than loopback, a token is required.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free port.")]


def serve(
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            help="Adapter folder; repeatable. Default: all of the most recent experiment.",
        ),
    ] = None,
    adapters: AdaptersDir = Path("adapter"),
    base: BaseModel = None,
    host: Host = "127.0.0.1",
    port: Port = 7860,
    allow_host: AllowHost = None,
    page: Annotated[bool, typer.Option(help="Serve the page at / besides the API at /v1.")] = True,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="File of the page's examples. Default: rows of the data set, if on this machine.",
        ),
    ] = None,
    results: ResultsDir = Path("results"),
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of a reply in tokens.")
    ] = 1024,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Maximum number of queued requests.")
    ] = 64,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve a web page and an OpenAI-compatible API.

    They offer a base and any number of its adapters; the base is loaded once.
    """
    from slm_lora.data.prompts import read_prompts

    try:
        from slm_lora.serve.api import make_app
        from slm_lora.serve.engine import Engine
        from slm_lora.serve.guard import Guard
        from slm_lora.serve.server import listen
        from slm_lora.serve.server import serve as run

        if page:
            import gradio  # noqa: F401

            from slm_lora.serve.page import mount_page
    except ImportError as error:
        raise _not_installed("serve", error) from error
    folders = list(adapter or last_experiment(adapters))
    examples = read_prompts(prompts) if prompts else _dataset_examples(folders) if page else []
    listener = listen(host, port)
    variants = load_models(base, folders, device, precision)
    engine = Engine(variants, max_tokens=max_tokens, max_waiting=max_waiting)
    app = make_app(engine)
    if page:
        app = mount_page(app, engine, examples, best_adapter(folders, results))
    access = _access(host, listener.getsockname()[1], allow_host)
    out = console()
    for name in variants.names:
        out.print(f"model     {name}", soft_wrap=True)
    if page:
        out.print(f"page      {access.page_url}", soft_wrap=True)
    key = f"   key {access.token}" if access.token else ""
    out.print(f"API       {access.url}/v1{key}", soft_wrap=True)
    out.print("Ctrl-C stops the server")
    try:
        run(Guard(app, hosts=access.hosts, token=access.token), listener)
    finally:
        engine.close()


def watch(
    results: Annotated[
        Path, typer.Argument(metavar="[RESULTS]", help="Folder of the experiments' folders.")
    ] = Path("results"),
    host: Host = "127.0.0.1",
    port: Port = 7861,
    allow_host: AllowHost = None,
) -> None:
    """Serve a read-only page of experiments, running ones included.

    It shows cells at work, training curves, results and replies, and updates by itself.
    """
    try:
        from slm_lora.serve.experiments import is_experiment
        from slm_lora.serve.guard import Guard
        from slm_lora.serve.server import listen
        from slm_lora.serve.server import serve as run
        from slm_lora.serve.watch import make_watch_app
    except ImportError as error:
        raise _not_installed("watch", error) from error
    if not results.is_dir():
        raise UsageError(f"{results}: no such folder; name the folder of the experiments' folders")
    if is_experiment(results):
        raise UsageError(f"{results}: one experiment; name the folder that holds it")
    listener = listen(host, port)
    access = _access(host, listener.getsockname()[1], allow_host)
    out = console()
    out.print(f"page      {access.page_url}", soft_wrap=True)
    out.print("Ctrl-C stops the server")
    run(Guard(make_watch_app(results), hosts=access.hosts, token=access.token), listener)


class _Access(NamedTuple):
    """Who may use a server.

    Attributes:
        url: of the server.
        hosts: accepted host names.
        token: required of clients; None on a loopback address, unless SLM_LORA_TOKEN is set.
    """

    url: str
    hosts: set[str]
    token: str | None

    @property
    def page_url(self) -> str:
        """URL of the page, with the token."""
        return f"{self.url}/" + (f"?token={self.token}" if self.token else "")


def _access(host: str, port: int, allow_host: list[str] | None) -> _Access:
    import os
    import secrets

    from slm_lora.serve.guard import LOOPBACK

    is_remote = host not in LOOPBACK and host != "::1"
    token = os.environ.get("SLM_LORA_TOKEN") or (secrets.token_urlsafe(24) if is_remote else None)
    url_host = f"[{host}]" if ":" in host else host
    hosts = {*LOOPBACK, url_host.lower(), *(name.lower() for name in allow_host or ())}
    return _Access(f"http://{url_host}:{port}", hosts, token)


def _not_installed(command: str, error: ImportError) -> UsageError:
    return UsageError(
        f"{command}: {error.name} is not installed; run pip install '.[serve]' in a checkout"
    )


def last_experiment(adapters: Path) -> list[Path]:
    """The adapters of the experiment of the most recently written adapter.

    Raises:
        UsageError: no adapters.
    """
    files = sorted(adapters.glob("*/slm_lora.json"), key=lambda file: file.stat().st_mtime)
    adapter_keys: dict[Path, tuple[str, str]] = {}
    for file in files:
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
            adapter_keys[file.parent] = metadata["experiment"], metadata["base"]["sha256"]
        except (ValueError, KeyError, TypeError):
            continue
    usable = {
        folder: key
        for folder, key in adapter_keys.items()
        if (folder / "adapter_config.json").is_file()
    }
    if not usable:
        raise UsageError(
            f"{adapters}: holds no adapter; train one (make experiment) or give one (--adapter)"
        )
    newest_key = list(usable.values())[-1]
    return [folder for folder, key in usable.items() if key == newest_key]


def best_adapter(adapters: list[Path], results: Path) -> str | None:
    """Name of the adapter with the lowest held-out loss; None if no losses are recorded or they
    refer to different bases, test rows or tokens."""
    losses: dict[str, float] = {}
    test_sets = set()
    for folder in adapters:
        try:
            metadata = json.loads((folder / "slm_lora.json").read_text(encoding="utf-8"))
            run_name = f"{metadata['cell']}-{metadata['run'][:8]}"
            run_folder = results / metadata["experiment"] / "runs" / run_name
            run = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
            headline = run["evaluation"]["headline"]
            if run["hash"] == metadata["run"]:
                losses[folder.resolve().name] = float(run["evaluation"][headline]["loss"])
                test_sets.add((run["data"]["held_out_sha256"], run["model"]["sha256"], headline))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(losses, key=losses.__getitem__) if len(test_sets) == 1 else None


def _dataset_examples(adapters: list[Path]) -> list[Prompt]:
    """Some rows of the first adapter's data set; empty if it is not on this machine."""
    from slm_lora.adapters.io import ABOUT
    from slm_lora.config.schema import DataSection
    from slm_lora.data.prompts import prompts_from_rows
    from slm_lora.data.sources import read_rows
    from slm_lora.errors import SlmLoraError

    try:
        metadata = json.loads((adapters[0] / ABOUT).read_text(encoding="utf-8"))
        section = DataSection(**metadata["recipe"]["data"])
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []
    # Never download data for examples. Of a local file the recipe records only the name.
    if section.name != "ml-qa" and not Path(section.name).is_file():
        return []
    try:
        return prompts_from_rows(read_rows(section).rows, 12)
    except SlmLoraError:
        return []
