"""``python -m slm_lora``: the same as the command ``slm-lora`` (torchrun wants a module)."""

from slm_lora.cli import main

main()
