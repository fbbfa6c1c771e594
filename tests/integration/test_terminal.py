"""The command as a process: console encodings, closed pipes, internal errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slm_lora import __version__

from ..support.lab import Lab
from ..support.rows import make_rows, write_jsonl

TEXT = "什么→🙂 é ±█ \x1b[31m"


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: Path) -> Lab:
    lab = Lab(tmp_path / "lab", tiny_folder)
    rows = [{**row, "category": "问答"} for row in make_rows(120)]
    write_jsonl(lab.rows, [{**row, "instruction": f"{TEXT} {row['instruction']}"} for row in rows])
    return lab


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "slm_lora", *map(str, arguments)],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


SEVERAL = """
import json, sys
from slm_lora.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["slm-lora", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    print("\\f", flush=True)
"""


def run_each(*commands: tuple[object, ...], **environment: str) -> tuple[list[bytes], bytes]:
    """Commands one after the other in one process; what each writes to stdout, and all to stderr.

    The process imports torch once.
    """
    words = json.dumps([[str(word) for word in command] for command in commands])
    completed = subprocess.run(
        [sys.executable, "-c", SEVERAL, words],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert completed.returncode == 0, completed.stderr
    *outputs, _ = completed.stdout.split(b"\f")
    assert len(outputs) == len(commands)
    return outputs, completed.stderr


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"PYTHONIOENCODING": "cp1252"}, "\\u4ec0\\u4e48->\\U0001f642 é ±# \\x1b[31m"),
        ({"PYTHONIOENCODING": "ascii"}, "\\u4ec0\\u4e48->\\U0001f642 \\xe9 +/-# \\x1b[31m"),
        ({"PYTHONIOENCODING": "utf-8"}, "什么→🙂 é ±█ \\x1b[31m"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "\\u4ec0\\u4e48->"),
    ],
)
def test_rows_are_shown_on_any_console(lab: Lab, environment: dict[str, str], shown: str) -> None:
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    commands = (("data", "show", lab.recipe), ("data", "check", lab.recipe))
    (rows, checks), _ = run_each(*commands, **environment)
    assert shown in rows.decode(encoding)
    bar = "█" if encoding == "utf-8" else "#"
    assert bar * 40 in checks.decode(encoding)


def test_replies_are_shown_on_a_console_of_another_encoding(
    lab: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"instruction": TEXT}) + "\n")
    options = ("--base", tiny_folder, "--max-new-tokens", 20)
    outputs, log = run_each(
        ("generate", TEXT, *options),
        ("generate", "--prompts", prompts, *options),
        ("compare-outputs", prompts, *options),
        PYTHONIOENCODING="cp1252",
    )
    for output in outputs:
        assert output.decode("cp1252").strip()
    assert log.count(b"  loading /") == len(outputs)


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("lines", [0, 1])
def test_closed_pipe_ends_the_command_silently(lab: Lab, lines: int) -> None:
    rows = 100  # more than the buffer of a pipe
    process = subprocess.Popen(
        [sys.executable, "-m", "slm_lora", "data", "show", str(lab.recipe), "--rows", str(rows)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    assert process.stdout and process.stderr
    if lines:
        process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 141
    assert errors == b""


def test_internal_error_is_one_line_before_its_traceback(tmp_path: Path) -> None:
    script = (
        "import sys; from slm_lora import cli\n"
        "from slm_lora.config import load\n"
        "def broken(*words): raise KeyError('zebra')\n"
        "load.load_recipe = broken\n"
        "sys.argv = ['slm-lora', 'experiment', 'x.yaml']; cli.main()"
    )
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert completed.returncode == 1
    first = completed.stderr.splitlines()[0]
    assert first.startswith("internal error: KeyError: 'zebra'; please report it")
    assert "Traceback" in completed.stderr


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_reported_without_traceback(lab: Lab) -> None:
    lab.rows.chmod(0)
    completed = run("data", "show", lab.recipe)
    assert completed.returncode in (3, 6) and b"Traceback" not in completed.stderr


def test_version_option_and_command_print_the_version() -> None:
    for argument in ("--version", "version"):
        assert run(argument).stdout.decode().strip() == f"slm-lora {__version__}"
