"""fastft where none of its kernels is: macOS, Windows, a Linux without a compiler.

Each script is a process of its own, which sees no kernel and, on Linux, the name of another system.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SYSTEMS = sorted({sys.platform, "darwin", "win32"})

START = """
import sys
sys.modules["triton"] = None  # which these systems do not have
import torch, torch._dynamo  # they need the true name
sys.platform = {system!r}
import fastft
torch.manual_seed(0)
same = torch.testing.assert_close
"""
CASES = {
    "what is used is told": """
from fastft import _native
from fastft.commands.engines import main
assert _native.missing("cpu") and _native.missing("cuda")
main()
""",
    "cross_entropy": """
logits = torch.randn(9, 33, requires_grad=True)
target = torch.tensor([1, 2, -100, 32, 0, 5, -100, 7, 8])
for function in (fastft.cross_entropy, torch.nn.functional.cross_entropy):
    loss = function(logits, target, label_smoothing=0.1)
    found = loss.detach(), *torch.autograd.grad(loss, logits)
    expected = found if function is fastft.cross_entropy else expected
same(expected, found)
""",
    "linear_cross_entropy": """
hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(33, 8, requires_grad=True)
target = torch.tensor([1, 2, -100, 32, 0, 5, -100, 7, 8])
ours = fastft.linear_cross_entropy(hidden, weight, target)
stock = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
same(ours, stock)
same(torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(stock, (hidden, weight)))
""",
    "AdamW with clipping": """
start = [torch.randn(5, 7), torch.randn(63)]
ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
optimizer, stock = fastft.AdamW(ours, max_grad_norm=1.0), torch.optim.AdamW(theirs)
for step in range(4):
    for ours_p, theirs_p in zip(ours, theirs):
        ours_p.grad = torch.randn_like(ours_p)
        theirs_p.grad = ours_p.grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    optimizer.step(), stock.step()
same(ours, theirs)
""",
    "bf16 parameters follow fp32": """
exact = torch.nn.Parameter(torch.randn(65).bfloat16())
full = torch.nn.Parameter(exact.detach().float())
optimizer, stock = fastft.AdamW([exact]), torch.optim.AdamW([full])
for step in range(4):
    exact.grad = torch.randn(65).bfloat16()
    full.grad = exact.grad.float()
    optimizer.step(), stock.step()
same(exact.float(), full, rtol=2**-8, atol=0)
""",
    "packs": """
examples = [{{"input_ids": list(range(n))}} for n in (5, 3, 7, 2, 6)]
plan = fastft.plan_packs([len(each["input_ids"]) for each in examples], 8)
assert sorted(plan.indices.tolist()) == [0, 1, 2, 3, 4] and len(plan) == 3
batch = fastft.PackingCollator()(examples[:2])
assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
assert batch["labels"].tolist() == [[-100, 1, 2, 3, 4, -100, 1, 2]]
""",
}
TRAINER = """
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
sizes = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
rows = [{{"input_ids": torch.randint(40, (9,)).tolist()}} for _ in range(8)]
rows = [row | {{"labels": row["input_ids"]}} for row in rows]
losses = {{}}
for fast in (False, True):
    torch.manual_seed(1)
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = LlamaForCausalLM(config)
    args = TrainingArguments({folder!r}, max_steps=4, per_device_train_batch_size=2, seed=1,
                             logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
                             disable_tqdm=True)
    callbacks = [fastft.FusedLossCallback()] if fast else []
    optimizers = fastft.adamw(model, args) if fast else (None, None)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks, optimizers=optimizers)
    trainer.train()
    losses[fast] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert len(losses[True]) == 4
same(torch.tensor(losses[True]), torch.tensor(losses[False]))
"""


def run(script: str) -> None:
    environment = {**os.environ, "FASTFT_DISABLE": "all"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_piece_computes_what_torch_computes(system: str) -> None:
    run((START + "".join(CASES.values())).format(system=system))


def test_a_training_has_the_losses_of_stock_trainer(tmp_path) -> None:
    pytest.importorskip("transformers")
    run((START + TRAINER).format(system=sys.platform, folder=str(tmp_path)))
