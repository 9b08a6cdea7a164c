"""`attn_implementation="fastft"` is known to transformers from the moment on that its models are.

The registry is a class of `transformers.modeling_utils`, which takes seconds to import and which
`import fastft` must not import: the name is registered behind its import.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

from fastft.on_import import when_imported

REGISTRY = "transformers.modeling_utils"


def register_with_transformers() -> None:
    """Registers the name now, or when `transformers.modeling_utils` is imported. Imports nothing
    and never raises."""
    when_imported(REGISTRY, _register)


def _register(models: ModuleType) -> None:
    # not ours to fail: an explicit register_attention() says why
    with contextlib.suppress(Exception):
        from fastft.attention.attention import register_attention  # it imports torch

        register_attention()
