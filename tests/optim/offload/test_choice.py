"""`offload="auto"`: the first tier that fits, and in its place a safe one where nobody knows."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.trainers import llama_config
from transformers import AutoModelForCausalLM

import fastft
from fastft.commands import estimate
from fastft.foreign import sharding
from fastft.optim.offload import choice, pieces, tiers
from fastft.optim.offload.choice import Batch

GROUPS = [
    {
        "params": [torch.zeros(1000, 1000, dtype=torch.bfloat16)],
        "moments": "fp32",
        "amsgrad": False,
    }
]
TIERS = (None, "states", "gradients")


@pytest.fixture
def sizes(monkeypatch):
    """The bytes of `GROUPS` in each tier, with buffers that are small beside it."""
    monkeypatch.setattr(pieces, "BUFFER", 9001)
    return {tier: tiers.bytes_of(GROUPS, "exact", tier).device for tier in TIERS}


@pytest.fixture
def gpu(monkeypatch):
    """A device with so many bytes free, which this process's TrainingArguments have."""

    def of(free, **values):
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (free, 1 << 40))
        monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 0)
        usual = {"fp16": False, "bf16": False, "gradient_accumulation_steps": 1}
        usual |= {"label_smoothing_factor": 0.0, "device": torch.device("cuda"), "world_size": 1}
        return SimpleNamespace(**usual | values)

    return of


def chosen(args, groups=GROUPS, **known):
    return choice.choose(groups, "exact", args=args, **known)


@pytest.mark.parametrize(
    ("fits", "less", "tier"),
    [(None, 0, None), (None, 1, "states"), ("states", 0, "states"), ("states", 1, "gradients")],
)
def test_activations_that_nobody_knows_are_taken_for_half_of_the_device(
    gpu, sizes, fits, less, tier
):
    free = 2 * sizes[fits] - less
    found = chosen(gpu(free))
    assert found.offload == tier
    assert "activations, which are taken for half of it: the model or the length" in found.why


def same(numbers, own):
    numbers[:] = [own, own]


def test_gradients_of_copies_and_of_a_grad_scaler_stay(gpu, sizes, monkeypatch):
    assert chosen(gpu(1000, fp16=True)).offload == "states"
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", same)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: None)
    assert chosen(gpu(1000)).offload == "states"
    assert chosen(gpu(1000, fsdp="full_shard")).offload == "gradients"
    # each of the two processes has half of it
    assert chosen(gpu(sizes[None], fsdp="full_shard")).offload is None


def test_all_processes_take_what_the_fullest_device_can(gpu, sizes, monkeypatch):
    monkeypatch.setattr(sharding, "world_size", lambda: 2)

    def gathered(numbers, own):
        numbers[:] = [own, 2 * sizes["states"]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects: None)
    assert chosen(gpu(1 << 40)).offload == "states"


def test_frozen_weights_that_are_still_to_come_take_their_place(gpu):
    model = torch.nn.Sequential(torch.nn.Linear(2000, 1000, bias=False), torch.nn.Linear(1, 1))
    model[0].requires_grad_(False)
    groups = [{**GROUPS[0], "params": [*model[1].parameters()]}]
    assert chosen(gpu(8_000_000), groups, model=model).offload == "gradients"
    assert chosen(gpu(8_100_000), groups, model=model).offload is None


def test_a_cpu_keeps_all_where_it_is():
    param = torch.nn.Parameter(torch.ones(7))
    optimizer = fastft.AdamW([param], offload="auto")
    assert optimizer.offload is None
    assert optimizer.choice.why == "on a CPU the host's memory is the device's"


@pytest.mark.parametrize(
    "params",
    [
        lambda p: (each for each in [p]),
        lambda p: [("name", p)],
        lambda p: [{"params": p}],
        lambda p: [{"params": (each for each in [p]), "lr": 0.5}],
    ],
    ids=["generator", "pairs", "tensor", "group with a generator"],
)
def test_parameters_come_in_every_form(params):
    param = torch.nn.Parameter(torch.ones(7))
    optimizer = fastft.AdamW(params(param), offload="auto")
    assert optimizer.param_groups[0]["params"] == [param]


def test_no_parameters_are_torchs_to_refuse():
    with pytest.raises(ValueError, match="empty parameter list"):
        fastft.AdamW([], offload="auto")


def llama(vocab_size=503, **sizes):
    config = llama_config(vocab_size, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def groups_of(model):
    return [{**GROUPS[0], "params": [*model.parameters()]}]


def in_this_process(command, **options):
    code = estimate.main(command[command.index("estimate") + 1 :])
    return SimpleNamespace(returncode=code, stderr="")


@pytest.mark.parametrize(
    "run", [in_this_process, pytest.param(subprocess.run, marks=pytest.mark.slow)]
)
def test_an_estimate_decides_where_model_and_batch_are_known(gpu, monkeypatch, run):
    """100 million parameters: 1.4 GB, or 0.6 with states on the host, or less with gradients, too;
    beside what `estimate` sets aside for the device itself."""
    monkeypatch.setattr(choice.subprocess, "run", run)
    with torch.device("meta"):
        model = llama(100_003, hidden_size=512)
    found = [
        chosen(
            gpu((1 << 30) + free, gradient_checkpointing=True),
            groups_of(model),
            model=model,
            batch=Batch(1, 64, ("loss",)),
        )
        for free in (1_800_000_000, 900_000_000)
    ]
    assert [each.offload for each in found] == [None, "states"]
    assert "GiB, as estimated for 1 x 64 tokens" in found[1].why


def asked(monkeypatch, said):
    """What an estimate is asked for, in the place of one."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if isinstance(said, Exception):
            raise said
        if said is not None:
            Path(command[command.index("--json") + 1]).write_text(json.dumps(said))
        return SimpleNamespace(returncode=0 if said else 2, stderr="fastft estimate: no such thing")

    monkeypatch.setattr(choice.subprocess, "run", run)
    return commands


def column(tier, bytes):
    peak = {"training": {"bytes": bytes}, "evaluation": {"bytes": 0}}
    return {"offload": tier, "columns": {"loss + optimizer": peak}}


def test_what_is_estimated_is_this_training(gpu, monkeypatch):
    commands, model = asked(monkeypatch, column("states", 3 << 30)), llama()
    args = gpu(4 << 30, gradient_accumulation_steps=3, gradient_checkpointing=True)
    groups = [{**groups_of(model)[0], "moments": "8bit"}]
    found = chosen(args, groups, model=model, batch=Batch(2, 77, ("loss", "packing")))
    assert found == ("states", "3.0 of 4.0 GiB, as estimated for 2 x 77 tokens")
    line = " ".join(commands[0])
    for words in (
        "--moments 8bit",
        "--rounding exact",
        "--only loss,packing,optimizer",
        "--rows 2 --max-tokens 77",
        "--accumulation 3",
        "--dtype bf16",
        "--checkpointing",
        f"--memory {4 << 30}",
    ):
        assert words in line


@pytest.mark.parametrize("said", [None, OSError("no processes")], ids=["refused", "no process"])
def test_an_estimate_that_fails_leaves_the_safe_choice(gpu, monkeypatch, said):
    asked(monkeypatch, said)
    model = llama()
    found = chosen(gpu(1 << 20), groups_of(model), model=model, batch=Batch(1, 8))
    assert found.offload == "gradients"
    assert ("no such thing" if said is None else "no estimate was made (OSError)") in found.why


def test_a_part_of_a_model_is_not_estimated(gpu, monkeypatch):
    commands, model = asked(monkeypatch, column(None, 0)), llama()
    model.lm_head.requires_grad_(False)
    found = chosen(gpu(1 << 30), groups_of(model), model=model, batch=Batch(1, 8))
    assert found.offload is None and not commands
    assert "not all of it is trained" in found.why


def test_a_tier_that_is_not_possible_is_told(gpu, monkeypatch):
    asked(monkeypatch, column("gradients", 1 << 30))
    model = llama()
    args = gpu(1 << 30, fp16=True)
    found = chosen(args, groups_of(model), model=model, batch=Batch(1, 8))
    assert found == ("states", "gradients is not possible here, and states may not fit")


def test_on_a_macs_gpu_nothing_is_put_elsewhere():
    groups = [{"params": [torch.zeros(3)], "moments": "fp32", "amsgrad": False}]
    found = choice.choose(groups, "exact", args=SimpleNamespace(device=torch.device("mps")))
    assert found == (None, "a Mac's GPU has the host's memory")
