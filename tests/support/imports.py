"""Libraries that a command imports."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")

RUN = """
import sys
from slm_lora.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print("loaded", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def loaded(*arguments: object) -> str:
    """Heavy libraries that a command imported: its last line on standard error."""
    script = RUN.format(heavy=HEAVY)
    completed = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stderr.splitlines()[-1]
