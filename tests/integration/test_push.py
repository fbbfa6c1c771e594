"""Push: uploaded files, model card, and the commands in the card.

The hub is a fake server on the loopback interface that implements the part of the hub's API which
huggingface_hub uses. Tests do not reach the real hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from slm_lora.data.chat_templates import freeze_date
from slm_lora.errors import IntegrityError, StorageError, UsageError
from slm_lora.export.hub import dry_run, push
from slm_lora.export.merge import merge
from slm_lora.export.trained import read_trained
from slm_lora.model.resolve import ModelSource

from ..support.exports import change_metadata, make_adapter
from ..support.lab import command

REPOSITORY = "somebody/toy-adapter"
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "slm_lora.json"}  # fmt: skip


@pytest.fixture
def adapter(tiny_source: ModelSource, tmp_path: Path) -> Path:
    return make_adapter(tiny_source, tmp_path / "adapter" / "toy")


def set_metadata(folder: Path, **changes: Any) -> None:
    def change(metadata: dict[str, Any]) -> None:
        for key, value in changes.items():
            section = metadata
            *parts, last = key.split("__")
            for part in parts:
                section = section[part]
            section[last] = value

    change_metadata(folder, change)


def front(readme: str) -> dict[str, Any]:
    metadata: dict[str, Any] = yaml.safe_load(readme.split("---")[1])
    return metadata


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory; weights are uploaded by LFS."""

    files: dict[str, bytes]
    large: dict[str, bytes]
    created: list[dict[str, Any]]
    tokens: set[str | None]
    refuses: bool

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state, url = type(self), f"http://127.0.0.1:{self.server.server_address[1]}"
        state.tokens.add(self.headers.get("Authorization"))
        if state.refuses:
            return self.answer({"error": "Forbidden"}, 403)
        if self.path == "/api/repos/create":
            state.created.append(json.loads(body))
            return self.answer({"url": f"{url}/{REPOSITORY}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path == f"/api/models/{REPOSITORY}/preupload/main":
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith("tensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )
        if self.path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = [
                {**file, "actions": {"upload": {"href": f"{url}/put/{file['oid']}"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == f"/api/models/{REPOSITORY}/commit/main", self.path
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                state.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                state.files[value["path"]] = state.large[value["oid"]]
        return self.answer(
            {"success": True, "commitOid": "0" * 40, "commitUrl": f"{url}/{REPOSITORY}/commit/0"}
        )

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/put/")
        assert hashlib.sha256(data).hexdigest() == name
        type(self).large[name] = data
        self.answer({})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Hub], str]]:
    class Own(Hub):
        files, large, created = {}, {}, []
        tokens, refuses = set(), False

    monkeypatch.setenv("HF_TOKEN", "a-token-of-the-test")
    # Xet, the newer protocol for large files, is a separate service; the fake has LFS only.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_adapter_and_card_only(
    adapter: Path, tmp_path: Path, hub: tuple[type[Hub], str]
) -> None:
    uploaded, endpoint = hub
    (adapter / "notes.txt").write_text("not for others")
    (adapter / "optimizer.pt").write_bytes(b"nor this")
    url = push(read_trained(adapter), REPOSITORY, tmp_path, private=True, endpoint=endpoint)
    assert url == f"{endpoint}/{REPOSITORY}"
    assert uploaded.tokens == {"Bearer a-token-of-the-test"}
    assert [
        (repository["name"], repository["organization"]) for repository in uploaded.created
    ] == [("toy-adapter", "somebody")]
    assert "private" in json.dumps(uploaded.created[0])
    assert uploaded.files.keys() == SENT
    for name in SENT - {"README.md"}:
        assert uploaded.files[name] == (adapter / name).read_bytes()
    # A dry run writes the same files.
    dry_run(read_trained(adapter), REPOSITORY, tmp_path, tmp_path / "dry")
    assert {p.name: p.read_bytes() for p in (tmp_path / "dry").iterdir()} == uploaded.files


def test_rejected_and_unreachable_uploads_are_reported(
    adapter: Path, tmp_path: Path, hub: tuple[type[Hub], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, endpoint = hub
    server.refuses = True
    with pytest.raises(StorageError, match="uploading somebody/toy-adapter failed") as caught:
        push(read_trained(adapter), REPOSITORY, tmp_path, endpoint=endpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageError, match="check network, token and name"):
        push(read_trained(adapter), REPOSITORY, tmp_path, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UsageError, match="not logged in"):
        push(read_trained(adapter), REPOSITORY, tmp_path, endpoint=endpoint)
    with pytest.raises(UsageError, match="give owner/name"):
        push(read_trained(adapter), "toy-adapter", tmp_path, endpoint=endpoint)


def test_card_has_settings_and_losses_of_the_run(adapter: Path, tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "results"
    record = json.loads((results / "quickstart" / "metrics.json").read_text())
    base, *_, run = record["runs"]
    assert base["cell"] == "base"
    set_metadata(adapter, experiment="quickstart", run=run["hash"], recipe=run["recipe"])
    set_metadata(adapter, base__name="smollm2-135m-instruct-q4_1")
    dry_run(read_trained(adapter), REPOSITORY, results, tmp_path / "dry")
    readme = (tmp_path / "dry" / "README.md").read_text()
    assert front(readme) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["slm-lora", "lora"],
    }
    # Parsed by the hub's own library.
    assert ModelCard(readme).data.license == "apache-2.0"
    loss = run["intervals"]["all"]
    assert f"| this | {loss['value']:.4f} | {loss['low']:.4f} – {loss['high']:.4f} |" in readme
    assert f"| base | {base['intervals']['all']['value']:.4f} | " in readme
    assert "BSD-3-Clause" in readme and "Apache-2.0" in readme
    rate = run["recipe"]["training"]["learning_rate"]
    assert f"| training.learning_rate | {rate:g} |" in readme
    for usage in ("PeftModel.from_pretrained", "vllm serve", "llama-server", "ollama create"):
        assert usage in readme


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ 1 }}", "`chat_template.jinja` holds it."),
        (
            freeze_date("{{ strftime_now('%Y') }}"),
            "jinja` holds it, with 26 Jul 2024 as today's date.",
        ),
        ("{{ strftime_now('%Y') }}", "it inserts today's, training used 26 Jul 2024."),
        (None, "no chat template gives other programs the same tokens."),
    ],
)
def test_card_describes_the_chat_template(
    template: str | None, sentence: str, adapter: Path, tmp_path: Path
) -> None:
    path = adapter / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    change_metadata(adapter)
    dry_run(read_trained(adapter), REPOSITORY, tmp_path, tmp_path / "dry")
    assert sentence in (tmp_path / "dry" / "README.md").read_text()


@pytest.mark.parametrize(
    ("base", "data", "licence", "dataset"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "databricks/databricks-dolly-15k", "cc-by-sa-3.0",
         ["databricks/databricks-dolly-15k"]),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "rows.jsonl", "other", None),
        ("somebody/a-model", "ml-qa", "other", None),
        ("tiny-llama", "ml-qa", "other", None),
    ],
)  # fmt: skip
def test_card_omits_unknown_licences_and_ids(
    base: str, data: str, licence: str, dataset: list[str] | None, adapter: Path, tmp_path: Path
) -> None:
    set_metadata(adapter, base__name=base, recipe__data__name=data)
    dry_run(read_trained(adapter), REPOSITORY, tmp_path, tmp_path / "dry")
    metadata = front((tmp_path / "dry" / "README.md").read_text())
    assert metadata["license"] == licence
    assert metadata.get("datasets") == dataset
    assert metadata.get("base_model") == (base if "/" in base else None)
    assert "Held-out loss" not in (tmp_path / "dry" / "README.md").read_text()


def test_commands_of_the_card_run(adapter: Path, tiny_source: ModelSource, tmp_path: Path) -> None:
    dry_run(read_trained(adapter), REPOSITORY, tmp_path, tmp_path / "toy-adapter")
    readme = (tmp_path / "toy-adapter" / "README.md").read_text()
    # The folder stands in for the download.
    run_python(readme, tmp_path, BASE=str(tiny_source.path))
    gguf = next(line for line in readme.splitlines() if line.startswith("slm-lora export gguf"))
    assert gguf == 'slm-lora export gguf toy-adapter toy-adapter-gguf --as adapter --base "$BASE"'
    words = gguf.replace('"$BASE"', str(tiny_source.path)).split()[1:]
    words[2:4] = [str(tmp_path / name) for name in words[2:4]]
    assert command(*words) == 0
    served = next(line for line in readme.splitlines() if line.startswith("llama-server"))
    named = [word for word in served.split() if word.endswith(".gguf")]
    assert len(named) == 2 and all((tmp_path / name).is_file() for name in named)


@pytest.mark.usefixtures("verify_in_process")
def test_merged_model_is_pushed_as_a_full_model(
    adapter: Path, tiny_source: ModelSource, tmp_path: Path
) -> None:
    merge(read_trained(adapter), tmp_path / "merged", "fp32", tiny_source.path)
    dry_run(read_trained(tmp_path / "merged"), "somebody/whole", tmp_path, tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "slm_lora.json",
    }  # fmt: skip
    readme = (tmp_path / "whole" / "README.md").read_text()
    assert front(readme)["library_name"] == "transformers"
    assert "A LoRA adapter merged into `tiny-llama`, in fp32. On 80 of 80 prompts" in readme
    run_python(readme, tmp_path)


def run_python(readme: str, folder: Path, **environment: str) -> None:
    script = readme.split("python - <<'END'\n")[1].split("\nEND\n")[0]
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("{home}/models/base", "contains a path of this machine"),
        ("hf_" + "a" * 34, "looks like a hub token"),
    ],
)
def test_push_refuses_local_paths_and_hub_tokens(
    secret: str, message: str, adapter: Path, tmp_path: Path
) -> None:
    set_metadata(adapter, recipe__data__name=secret.format(home=Path.home()))
    with pytest.raises(IntegrityError, match=message):
        dry_run(read_trained(adapter), REPOSITORY, tmp_path, tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_push_command_prints_files_and_refuses_bad_arguments(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run_option = ("--dry-run", tmp_path / "dry")
    assert command("push", adapter, REPOSITORY, *dry_run_option) == 0
    assert {Path(line).name for line in capsys.readouterr().out.split()} == SENT
    shutil.rmtree(tmp_path / "dry")
    assert command("push", adapter, "no-owner", *dry_run_option) == 2
    assert command("push", tmp_path, REPOSITORY, *dry_run_option) == 2
    assert "neither an adapter" in capsys.readouterr().err
