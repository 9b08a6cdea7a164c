"""The configuration of a model that a user names, without the code that may lie beside it.

A config.json can name classes in files of its repository (`auto_map`), and kernels of the hub
(`attn_implementation`), which transformers would run. Where a model makes its parts from the
configurations in its own, transformers asks the user on its own account, whatever was said for the
whole: so `auto_map` is taken out of every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_ATTENTION = ("attn_implementation", "_attn_implementation_internal")


def load_config(name: str) -> PreTrainedConfig:
    """The configuration in a folder or a file, or of a model of the hub.

    Raises:
        ValueError: there is none, transformers does not know its model type, or it needs code that
            is not transformers' own.
    """
    local = Path(name).expanduser()
    if (local.suffix == ".json" or name.startswith((".", "/", "~"))) and not local.exists():
        raise ValueError(f"there is no file or folder {name!r}")
    place = str(local) if local.exists() else name
    try:
        fields, _ = PreTrainedConfig.get_config_dict(place)
        if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"{fields.get('model_type')!r} is no model of transformers: its code lies beside "
                "its configuration (auto_map), and fastft does not run it"
            )
        config: PreTrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False)
        _leave_code_out(config)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no configuration of a model in {name!r}: {reason}") from error
    return config


def _leave_code_out(config: PreTrainedConfig) -> None:
    for fields in _parts(config):
        fields.pop("auto_map", None)
        for attention in map(fields.get, _ATTENTION):
            if "/" in str(attention):
                raise ValueError(
                    f"its attn_implementation must be one of transformers', got {attention!r}: "
                    "code of the hub, which fastft does not run"
                )


def _parts(thing: Any) -> Iterator[dict[str, Any]]:
    """The fields of a configuration, and of all that are nested in it."""
    fields = vars(thing) if isinstance(thing, PreTrainedConfig) else thing
    if isinstance(fields, dict):
        yield fields
        fields = list(fields.values())
    if isinstance(fields, list):
        for part in fields:
            yield from _parts(part)
