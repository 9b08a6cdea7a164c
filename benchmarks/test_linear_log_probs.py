"""Log-probability and entropy of every token, forward and backward, as GRPO asks for them.

The bare work is the four GEMMs: logits, logits again, and the two gradients. Shapes as in
heads.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from compare import compare, rival
from errors import check, peaks_mib
from heads import IDS, make, shape_of, stepping, told

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
def test_linear_log_probs(benchmark, device, small, dtype):
    shape = shape_of(device, dtype, small)
    x, weight, target = make(device, dtype, shape)
    logits = x.new_empty(len(x), len(weight))
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)

    def gemms():
        with torch.no_grad():
            for _ in range(2):
                torch.mm(x, weight.T, out=logits)
            torch.mm(logits, weight, out=d_x)
            torch.mm(logits.T, x, out=d_weight)

    losses = {"ours": ours, **rivals()}
    steps = {name: stepping(loss, x, weight, target) for name, loss in losses.items()}
    rows = max(min(len(x), 2**27 // len(weight)), 1)  # of which float64 fits a GPU
    info = benchmark.extra_info
    info["shape"] = told(shape)

    def checked():
        info["relative_errors"] = check(
            {
                name: lambda *pair, loss=loss: loss(*pair, target[:rows])
                for name, loss in losses.items()
            },
            lambda *pair: eager(*pair, target[:rows]),
            (x.detach()[:rows].requires_grad_(), weight),
            ("loss", "d_input", "d_weight"),
            plain="torch eager",
            terms=sum(shape),
        )

    compare(
        benchmark,
        steps["ours"],
        {name: step for name, step in steps.items() if name != "ours"},
        check=checked,
        # a fused head computes logits twice, who keeps them once
        products=(6 * logits.numel() * x.shape[1], dtype),
        bare=gemms,
    )
    info["peak_mib"] = peaks_mib(steps, x, weight)
