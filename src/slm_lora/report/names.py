"""Names of settings and of recipe keys, as people write them."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.config.types import METHOD_LABELS
from slm_lora.stats.settings import Setting, varied

_KEYS = {
    "adapter.r": "rank",
    "data.size": "dataset size",
    "adapter.target_modules": "target modules",
    "adapter.kind": "method",
    "adapter.lora_alpha": "alpha/r",
    "model.name": "base model",
}


MOST_MODULES = 4
"""Target modules that are named one by one."""


def key_name(key: str, tied: Sequence[str] = ()) -> str:
    """A recipe key in words, with the keys that vary along with it."""
    name = _KEYS.get(key, key.rsplit(".", 1)[-1].replace("_", " "))
    return f"{name} with its {' and '.join(map(key_name, tied))}" if tied else name


_LABELS: dict[str | None, str] = {None: "none", **{str(k): v for k, v in METHOD_LABELS.items()}}


def value_name(value: object) -> str:
    """The value of a recipe key."""
    if isinstance(value, str | None):
        return _LABELS.get(value, str(value))
    if isinstance(value, list | tuple):
        names = [*map(str, value)]
        return "+".join(names) if len(names) <= MOST_MODULES else f"{len(names)} modules"
    return str(value)


def rate_name(rate: float) -> str:
    """A learning rate: ``2e-4``."""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


class SettingNames:
    """Names of the settings of one experiment, from the keys that they differ in.

    Args:
        settings: all trained settings of the experiment.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        adapters = [setting for setting in settings if not setting.is_full]
        self._keys = list(varied(adapters)) if adapters else []
        full = [setting for setting in settings if setting.is_full]
        self._full_keys = [key for key in varied(full) if not key.startswith("adapter.")]
        kinds = {setting.setting("adapter.kind") for setting in settings}
        if len(kinds) > 1 and "adapter.kind" not in self._keys:
            self._keys.insert(0, "adapter.kind")
        self._sizes = len({setting.setting("data.size") for setting in settings}) > 1
        models = {_model(setting) for setting in settings}
        self._models = len(models) > 1
        self._same_name = len({name for name, _ in models}) < len(models)
        if self._models:
            self._keys = [key for key in self._keys if not key.startswith("model.")]

    def of(self, setting: Setting) -> str:
        """``r=16, 1500 rows``; for the base model ``base``."""
        if setting.first_run.is_base:
            return f"base {self.model(setting)}" if self._models else "base"
        parts = [self.model(setting)] if self._models else []
        full = setting.is_full
        if full:
            parts.append(METHOD_LABELS["full"])
        keys = [key for key in self._keys if not (full and key.startswith("adapter."))]
        if full:  # all weights train: keys of an adapter have no effect
            keys += [key for key in self._full_keys if key not in keys]
        for key in keys:
            parts.append(self.part(key, setting))
        if full and self._sizes and "data.size" not in keys:
            parts.append(self.part("data.size", setting))
        if len(parts) == self._models:  # nothing but the base, if there are several
            parts += [
                f"{METHOD_LABELS[setting.setting('adapter.kind')]} r={setting.setting('adapter.r')}"
            ]
        return ", ".join(parts)

    def model(self, setting: Setting) -> str:
        """The base model, with a part of its SHA-256 where two have one name."""
        name, digest = _model(setting)
        return f"{name} ({digest[:8]})" if self._same_name else name

    def series(self, key: str, setting: Setting) -> str:
        """The name without ``key``, for a series along it."""
        others = [self.part(other, setting) for other in self._keys if other != key]
        return ", ".join(others) or (
            "all settings" if key == "adapter.r" else f"r={setting.setting('adapter.r')}"
        )

    def series_keys(self, key: str) -> str:
        """What the names of `series` along ``key`` consist of."""
        others = [key_name(other) for other in self._keys if other != key]
        return " and ".join(filter(None, [", ".join(others[:-1]), *others[-1:]]))

    @staticmethod
    def part(key: str, setting: Setting) -> str:
        """``r=16``: one key of a setting."""
        value = setting.setting(key)
        if key == "adapter.kind":
            return METHOD_LABELS[value]
        if key == "adapter.r":
            return f"r={value}"
        if key == "data.size":
            return "all rows" if value is None else f"{value} rows"
        if key == "adapter.target_modules":
            return _modules(value)
        if key == "training.learning_rate":
            return f"lr {rate_name(float(value))}"
        if key == "adapter.lora_alpha":
            return f"alpha={value:g}"
        return f"{key.rsplit('.', 1)[-1]}={value_name(value)}"


def _model(setting: Setting) -> tuple[str, str]:
    model = setting.first_run.run.record.model
    return model.name, model.sha256


def _modules(value: object) -> str:
    if not isinstance(value, list | tuple):
        return str(value)
    names = [str(name).removesuffix("_proj") for name in value]
    return "+".join(names) if len(names) <= MOST_MODULES else f"{len(names)} modules"
