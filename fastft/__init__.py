"""fastft: faster, leaner and exact fine-tuning with Hugging Face Trainer.

`fastft.plug(trainer)` does what fits a Trainer. By hand there are three pieces, each of which works
alone and enters through an official Trainer input:

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=fastft.pack(dataset, max_tokens=8192),
        data_collator=fastft.PackingCollator(),
        optimizers=fastft.adamw(model, args),
        callbacks=[fastft.FusedLossCallback()],
    )
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastft.attention.registration import register_with_transformers

if TYPE_CHECKING:
    from fastft.attention.attention import register_attention
    from fastft.attention.segments import packed_attention
    from fastft.data.collator import PackingCollator
    from fastft.data.packed import pack
    from fastft.data.plan import plan_packs
    from fastft.data.tasks.seq2seq import seq2seq_masks
    from fastft.integrations.block_mask import block_mask
    from fastft.integrations.clipping import fuse_clipping
    from fastft.integrations.fused_loss import FusedLossCallback
    from fastft.integrations.packing import PackingCallback
    from fastft.integrations.plug.plug import plug
    from fastft.integrations.pool_segments import pool_segments
    from fastft.integrations.probe.check_packing import PackingLeakError, check_packing
    from fastft.integrations.throughput import ThroughputCallback
    from fastft.loss.cross_entropy import CrossEntropyLoss, cross_entropy
    from fastft.loss.lazy.output_head import fused_loss
    from fastft.loss.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
    from fastft.loss.linear_log_probs import LinearLogProbs, linear_log_probs, linear_token_loss
    from fastft.optim.adamw import AdamW
    from fastft.optim.factory import adamw, adamw_spec
    from fastft.optim.fp32_weights import load_fp32, save_fp32

__version__ = "0.2.0"

__all__ = [
    "AdamW",
    "CrossEntropyLoss",
    "FusedLossCallback",
    "LinearCrossEntropyLoss",
    "LinearLogProbs",
    "PackingCallback",
    "PackingCollator",
    "PackingLeakError",
    "ThroughputCallback",
    "adamw",
    "adamw_spec",
    "block_mask",
    "check_packing",
    "cross_entropy",
    "fuse_clipping",
    "fused_loss",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_token_loss",
    "load_fp32",
    "pack",
    "packed_attention",
    "plan_packs",
    "plug",
    "pool_segments",
    "register_attention",
    "save_fp32",
    "seq2seq_masks",
]


# The rooms of these names are imported when a name is first asked for: nobody waits for what is not
# used, and `python -m fastft run script.py` leaves the script to set what torch reads of the
# environment.
_ROOMS = {
    "fastft.attention.attention": ("register_attention",),
    "fastft.attention.segments": ("packed_attention",),
    "fastft.data.collator": ("PackingCollator",),
    "fastft.data.packed": ("pack",),
    "fastft.data.plan": ("plan_packs",),
    "fastft.data.tasks.seq2seq": ("seq2seq_masks",),
    "fastft.integrations.block_mask": ("block_mask",),
    "fastft.integrations.clipping": ("fuse_clipping",),
    "fastft.integrations.pool_segments": ("pool_segments",),
    "fastft.integrations.probe.check_packing": ("PackingLeakError", "check_packing"),
    "fastft.loss.cross_entropy": ("CrossEntropyLoss", "cross_entropy"),
    "fastft.loss.lazy.output_head": ("fused_loss",),
    "fastft.loss.linear_cross_entropy": ("LinearCrossEntropyLoss", "linear_cross_entropy"),
    "fastft.loss.linear_log_probs": ("LinearLogProbs", "linear_log_probs", "linear_token_loss"),
    "fastft.optim.adamw": ("AdamW",),
    "fastft.optim.factory": ("adamw", "adamw_spec"),
    "fastft.optim.fp32_weights": ("load_fp32", "save_fp32"),
}
# these subclass a class of transformers, which the others do not need
_ROOMS_OF_TRANSFORMERS = {
    "fastft.integrations.fused_loss": ("FusedLossCallback",),
    "fastft.integrations.packing": ("PackingCallback",),
    "fastft.integrations.plug.plug": ("plug",),
    "fastft.integrations.throughput": ("ThroughputCallback",),
}


def _import_rooms() -> None:
    """Imports all that needs no transformers: `torch.ops.fastft` then has every operator."""
    # whose operators no other room needs
    for room in (*_ROOMS, "fastft.layers.rms_norm", "fastft.layers.swiglu"):
        importlib.import_module(room)


def __getattr__(name: str) -> Any:
    for room, names in (_ROOMS | _ROOMS_OF_TRANSFORMERS).items():
        if name in names:
            # from the next time on it is found without this function
            found = globals()[name] = getattr(importlib.import_module(room), name)
            return found
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
