"""Adapters by PEFT: methods, targets, attaching, saving, loading, several at once."""
