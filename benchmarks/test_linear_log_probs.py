"""Log-probability and entropy of every token, forward and backward, as GRPO asks for them.

The bare work is the four GEMMs: logits, logits again, and the two gradients. Shapes as in
heads.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import compare, rival
from errors import peaks_mib, relative_errors
from heads import IDS, make, stepping

from fastft.loss.linear_log_probs import linear_log_probs

ENTROPY = 0.01  # of the objective: log_probs + 0.01 entropy


def ours(x, weight, target):
    token = linear_log_probs(x, weight, target)
    return (token.log_probs + ENTROPY * token.entropy).sum()


def eager(x, weight, target):
    log_p = F.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return (log_p.gather(-1, target[:, None])[:, 0] + ENTROPY * entropy).sum()


def rivals():
    found = {"torch eager": eager}
    if trl := rival("trl.trainer.utils"):
        tile = trl._CHUNKED_LOGPROB_CHUNK_SIZE

        def trl_logits(x, weight, target):
            log_probs, entropy = trl.selective_log_softmax_and_entropy(
                F.linear(x, weight)[None], target[None]
            )
            return (log_probs + ENTROPY * entropy).sum()

        def trl_head(x, weight, target):
            outputs = trl._ChunkedLogProbFunction.apply(
                x, weight, None, target, 1.0, tile, None, 1.0, ("entropy",)
            )
            return (outputs[0] + ENTROPY * outputs[1]).sum()

        found |= {"TRL over logits": trl_logits, "TRL's fused head": trl_head}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=IDS.get)
def test_linear_log_probs(benchmark, device, dtype):
    x, weight, target = make(device, dtype)
    logits = x.new_empty(len(x), len(weight))
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)

    def gemms():
        with torch.no_grad():
            for _ in range(2):
                torch.mm(x, weight.T, out=logits)
            torch.mm(logits, weight, out=d_x)
            torch.mm(logits.T, x, out=d_weight)

    losses = {"ours": ours, **rivals()}
    info = benchmark.extra_info
    info["shape"] = f"N={len(x)}, H={x.shape[1]}, V={len(weight)}"
    if device == "cpu":
        info["relative_errors"] = relative_errors(losses, eager, x, weight, target)
    steps = {name: stepping(loss, x, weight, target) for name, loss in losses.items()}
    info["peak_mib"] = peaks_mib(steps, x, weight)
    compare(benchmark, steps.pop("ours"), steps, rounds=5, bare=gemms)
