"""TRL's fused head, and the same calls answered by fastft.

A step is `model(..., labels=labels, fused_lm_head=True)` and the backward pass of the sum of its
log-probabilities, through a model that is a norm and an output head.
"""

from __future__ import annotations

import pytest
import torch
from compare import compare
from errors import peaks_mib

import fastft

# what each trainer asks for
OUTPUTS = {
    "GRPO": ("log_probs", "entropy"),
    "DPO": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "KTO": ("log_probs", "entropy", "mean_logits"),
}
TOKENS, HIDDEN, CLASSES = 512, 512, 32768


@pytest.mark.parametrize("trainer", OUTPUTS)
def test_trl_head(benchmark, device, small, trainer):
    trl = pytest.importorskip("trl.trainer.utils")
    transformers = pytest.importorskip("transformers")
    tokens, hidden, classes = (63, 32, 1003) if small else (TOKENS, HIDDEN, CLASSES)
    benchmark.extra_info["shape"] = f"T={tokens}, H={hidden}, V={classes}, fp32"
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "vocab_size": classes, "num_hidden_layers": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, intermediate_size=8)
    model = transformers.LlamaForCausalLM(config).to(device).train()
    trl.add_fused_lm_head(model, outputs=OUTPUTS[trainer])
    x = torch.randn(1, tokens + 1, hidden, device=device)
    labels = torch.randint(0, classes, (1, tokens + 1), device=device)

    def stock():
        model.zero_grad()
        total = model(inputs_embeds=x, labels=labels, fused_lm_head=True).log_probs.sum()
        total.backward()
        return total.detach(), model.lm_head.weight.grad

    def ours():
        with fastft.fused_loss(model) as report:
            found = stock()
        assert report.fused == 1, report
        return found

    def check():
        """As TRL's, which the tests of the loss hold to float64."""
        for mine, theirs in zip(ours(), stock(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)

    compare(benchmark, ours, {"TRL": stock}, check=check)
    peaks = {"ours": ours, "TRL": stock}
    benchmark.extra_info["peak_mib"] = peaks_mib(peaks, *model.parameters())
