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
import sys
from typing import TYPE_CHECKING, Any

from fastft.attention.registration import register_with_transformers

# `python -m fastft run script.py` imports this package first, and the script begins without torch
# as it does without fastft: it may still set what torch reads of the environment. While Python
# looks for what stands behind -m, argv[0] is "-m".
_WAITS = sys.argv[:1] == ["-m"] and "torch" not in sys.modules

if TYPE_CHECKING or not _WAITS:
    from fastft.attention.attention import register_attention
    from fastft.attention.segments import packed_attention
    from fastft.data.collator import PackingCollator
    from fastft.data.packed import pack
    from fastft.data.plan import plan_packs
    from fastft.data.tasks.seq2seq import seq2seq_masks
    from fastft.integrations.block_mask import block_mask
    from fastft.integrations.clipping import fuse_clipping
    from fastft.integrations.pool_segments import pool_segments
    from fastft.integrations.probe.check_packing import PackingLeakError, check_packing
    from fastft.loss.cross_entropy import CrossEntropyLoss, cross_entropy
    from fastft.loss.lazy.output_head import fused_loss
    from fastft.loss.linear_cross_entropy import LinearCrossEntropyLoss, linear_cross_entropy
    from fastft.loss.linear_log_probs import LinearLogProbs, linear_log_probs, linear_token_loss
    from fastft.optim.adamw import AdamW
    from fastft.optim.factory import adamw, adamw_spec
    from fastft.optim.fp32_weights import load_fp32, save_fp32

if TYPE_CHECKING:
    from fastft.integrations.fused_loss import FusedLossCallback
    from fastft.integrations.packing import PackingCallback
    from fastft.integrations.plug.plug import plug
    from fastft.integrations.throughput import ThroughputCallback

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


# these subclass a class of transformers, which fastft does not need to be imported
_OF_TRANSFORMERS = {
    "FusedLossCallback": "fastft.integrations.fused_loss",
    "PackingCallback": "fastft.integrations.packing",
    "ThroughputCallback": "fastft.integrations.throughput",
    "plug": "fastft.integrations.plug.plug",
}


def __getattr__(name: str) -> Any:
    if name in _OF_TRANSFORMERS:
        return getattr(importlib.import_module(_OF_TRANSFORMERS[name]), name)
    if _WAITS and name in __all__:
        importlib.import_module("torch")  # with it this file is executed whole
        return getattr(importlib.reload(sys.modules[__name__]), name)
    raise AttributeError(f"module 'fastft' has no attribute {name!r}")


register_with_transformers()
