"""AdamW under DDP, FSDP2 and torch.distributed.checkpoint: two processes on gloo, started once for
all tests.

Each rank sees the same batch, so that the mean of the gradients over the ranks is exact and every
result can be compared with one process to the bit.
"""

from __future__ import annotations

import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastft.optim.adamw import AdamW
from fastft.optim.adamw_state import new_state
from fastft.optim.fp32_weights import load_fp32, save_fp32
from fastft.optim.moment_codes import code_of

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo"),
    # told of one process, which is meant
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
MODES = {
    "fp32": (torch.float32, {"amsgrad": True}),
    "exact": (torch.bfloat16, {}),
    "kahan": (torch.bfloat16, {"rounding": "kahan", "amsgrad": True}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "moments": "bf16"}),
    "8bit": (torch.bfloat16, {"moments": "8bit"}),
    "4bit": (torch.bfloat16, {"moments": "4bit"}),
    "offloaded": (torch.bfloat16, {"offload": "states"}),
    "offloaded 8bit": (torch.bfloat16, {"moments": "8bit", "offload": "states"}),
}
STEPS = 6
WORLD = 2


def build(mode):
    """Odd sizes: neither the 7 nor the single row is a multiple of two ranks."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(5, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 7),
        torch.nn.Tanh(),
        torch.nn.Linear(7, 1),
    ]
    return torch.nn.Sequential(*layers).to(MODES[mode][0])


def optimizer_of(model, mode, seed=5, **others):
    options = {"seed": seed, **MODES[mode][1], **others}
    decaying = [param for param in model.parameters() if param.ndim > 1]
    rest = [param for param in model.parameters() if param.ndim <= 1]
    return AdamW([{"params": decaying}, {"params": rest, "weight_decay": 0.0}], lr=1e-2, **options)


def train(model, optimizer, first, last):
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def whole(tensor):
    if tensor.dtype == torch.int16:  # which gloo does not send
        tensor = tensor.to(torch.int32)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def snapshot(model, optimizer):
    """All weights and states, unsharded, under the model's names."""
    model = getattr(model, "module", model)
    return {
        name: {"weight": whole(param.detach()).clone()}
        | {entry: whole(value).clone() for entry, value in optimizer.state[param].items()}
        for name, param in model.named_parameters()
    }


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        for entry, value in left[name].items():
            assert value.dtype == right[name][entry].dtype and torch.equal(
                value, right[name][entry]
            ), (name, entry)


def undisturbed(mode, steps=STEPS):
    """In one process, with states beside the weights."""
    model = build(mode)
    optimizer = optimizer_of(model, mode, offload=None)
    train(model, optimizer, 0, steps)
    return model, optimizer


def sharded(mode, seed=5):
    model = build(mode)
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model, optimizer_of(model, mode, seed)


def save(model, optimizer, folder, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save(
        {"model": weights, "optimizer": states},
        checkpoint_id=folder,
        no_dist=not dist.is_initialized(),
    )


def load(model, optimizer, folder, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    weights, states = get_state_dict(model, optimizer, options=options)
    parts = {"model": weights, "optimizer": states}
    dcp.load(parts, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(
        model,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
        options=options,
    )


def under_ddp(mode, folder):
    model = torch.nn.parallel.DistributedDataParallel(build(mode))
    optimizer = optimizer_of(model, mode)
    train(model, optimizer, 0, STEPS)
    assert_same_bits(snapshot(model, optimizer), snapshot(*undisturbed(mode)))
    save_fp32(model, optimizer, f"{folder}/ddp-{mode}")  # keys without "module."
    dist.barrier()
    alone = build(mode)
    load_fp32(alone, optimizer_of(alone, mode), f"{folder}/ddp-{mode}")
    assert all(map(torch.equal, alone.parameters(), model.parameters()))


def under_fsdp2(mode, folder):
    model, optimizer = sharded(mode)
    train(model, optimizer, 0, STEPS)
    assert_same_bits(snapshot(model, optimizer), snapshot(*undisturbed(mode)))
    assert all(type(state["exp_avg"]).__name__ == "DTensor" for state in optimizer.state.values())


def sharded_after_construction(mode, folder):
    """As accelerate prepares FSDP2: the optimizer comes first, and its groups get the sharded
    parameters later."""
    model = build(mode)
    optimizer = optimizer_of(model, mode)
    names = {param: name for name, param in model.named_parameters()}
    groups = [[names[param] for param in group["params"]] for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer.state_dict())
    fully_shard(model)
    for group, of_group in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [model.get_parameter(name) for name in of_group]
    train(model, optimizer, 0, STEPS)
    assert_same_bits(snapshot(model, optimizer), snapshot(*undisturbed(mode)))


def fp32_weights_under_fsdp2(mode, folder):
    model, optimizer = sharded(mode)
    train(model, optimizer, 0, 3)
    save_fp32(model, optimizer, f"{folder}/fsdp2-{mode}")
    dist.barrier()
    again, resumed = sharded(mode, seed=6)  # that of the checkpoint counts
    resumed.load_state_dict(optimizer.state_dict())
    load_fp32(again, resumed, f"{folder}/fsdp2-{mode}")
    train(again, resumed, 3, STEPS)
    assert_same_bits(snapshot(again, resumed), snapshot(*undisturbed(mode)))


def checkpoint_of_one_process(mode, folder):
    for flatten in (False, True):
        model, optimizer = sharded(mode, seed=6)
        load(model, optimizer, f"{folder}/one-{mode}-{flatten}", flatten)
        train(model, optimizer, 3, STEPS)
        assert_same_bits(snapshot(model, optimizer), snapshot(*undisturbed(mode)))


def checkpoint_of_two_processes(mode, folder):
    for flatten in (False, True):
        model, optimizer = sharded(mode)
        train(model, optimizer, 0, 3)
        save(model, optimizer, f"{folder}/two-{mode}-{flatten}", flatten)
        again, resumed = sharded(mode, seed=6)  # that of the checkpoint counts
        load(again, resumed, f"{folder}/two-{mode}-{flatten}", flatten)
        train(again, resumed, 3, STEPS)
        assert_same_bits(snapshot(again, resumed), snapshot(*undisturbed(mode)))


def full_state_from_rank_0(mode, folder):
    """As accelerate resumes FSDP2: rank 0 reads whole tensors, each rank keeps its shard."""
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = sharded(mode)
    train(model, optimizer, 0, 3)
    weights, states = get_state_dict(model, optimizer, options=gathered)
    again, resumed = sharded(mode, seed=6)  # that of the checkpoint counts
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(again, weights, options=options)
    set_optimizer_state_dict(again, resumed, states, options=options)
    train(again, resumed, 3, STEPS)
    assert_same_bits(snapshot(again, resumed), snapshot(*undisturbed(mode)))


def any_placement(mode, folder):
    """Parameters sharded by hand: by rows, by columns, not at all."""
    dtype, options = MODES[mode]
    mesh = init_device_mesh("cpu", (WORLD,))
    value = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = [
        torch.randn(7, 9, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)
    ]
    placements = [Shard(0), Replicate()]
    # whose random bits and blocks follow rows
    if options.get("moments", "fp32") == "fp32":
        placements.append(Shard(1))
    for placement in placements:
        plain = torch.nn.Parameter(value.clone())
        parts = torch.nn.Parameter(distribute_tensor(value, mesh, [placement]))
        optimizers = [AdamW([param], seed=3, **options) for param in (plain, parts)]
        for grad in grads:
            plain.grad, parts.grad = grad, distribute_tensor(grad, mesh, [placement])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(parts.full_tensor(), plain), placement
        for entry, state in optimizers[0].state[plain].items():
            assert torch.equal(whole(optimizers[1].state[parts][entry]), whole(state)), (
                placement,
                entry,
            )


def long_vector(mode, folder):
    """Of a DTensor the moments are fp32 whatever its length, so that a checkpoint fits any number
    of processes."""
    dtype, options = MODES[mode]
    mesh = init_device_mesh("cpu", (WORLD,))
    value = torch.randn(9001, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = torch.nn.Parameter(value.clone())
    parts = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
    wide = {**options, "moments": "fp32"} if "bit" in mode else options
    optimizers = AdamW([plain], seed=3, **wide), AdamW([parts], seed=3, **options)
    for i in range(3):
        grad = torch.randn(9001, generator=torch.Generator().manual_seed(i)).to(dtype)
        plain.grad, parts.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(parts.full_tensor(), plain)
    for entry, state in optimizers[0].state[plain].items():
        assert torch.equal(whole(optimizers[1].state[parts][entry]), whole(state)), entry


def states_on_another_device_than_the_mesh(mode, folder):
    """As those of a GPU's weights on the host; the meta device is the other one here. Neither what
    is new nor what is cut out of whole tensors is moved to the mesh's device."""
    dtype, options = MODES[mode]
    group = {"moments": "fp32", "amsgrad": False, **options}
    mesh = init_device_mesh("cpu", (WORLD,))
    value = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    param = distribute_tensor(value, mesh, [Shard(0)])
    here = new_state(param, group, options.get("rounding", "exact"))
    there = new_state(param, group, options.get("rounding", "exact"), "meta")
    assert there.keys() == here.keys()
    for name in here.keys() - {"step"}:
        assert there[name].to_local().is_meta and there[name].is_meta
        for form in ("shape", "dtype", "placements"):
            assert getattr(there[name], form) == getattr(here[name], form)
        assert there[name].to_local().shape == here[name].to_local().shape
        assert there[name].stride() == here[name].stride()
    moved = there["exp_avg"].to("meta")
    assert moved.to_local().is_meta and moved.placements == param.placements


def flat_parameters_of_fsdp1(mode, folder):
    """Long vectors, whose moments are codes; FSDP1 gathers them as fp32 ones, and none of their
    bits is lost."""
    if "bit" not in mode:
        return

    def build_flat():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(96, 128), torch.nn.Tanh(), torch.nn.Linear(128, 96)
        )
        # use_orig_params=True gathers a wrong exp_avg on a CPU (torch 2.13), that of
        # torch.optim.AdamW as well
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)

    def train_flat(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            model(
                torch.randn(4, 96, generator=torch.Generator().manual_seed(step))
            ).square().sum().backward()
            optimizer.step()

    model = build_flat()
    optimizer = AdamW(model.parameters(), seed=5, **MODES[mode][1])
    train_flat(model, optimizer, 0, 3)
    assert all(code_of(state["exp_avg"]) for state in optimizer.state.values())
    gathered = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    again = build_flat()
    resumed = AdamW(again.parameters(), seed=5, **MODES[mode][1])
    resumed.load_state_dict(
        FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, gathered)
    )
    for param, weight in zip(again.parameters(), model.parameters(), strict=True):
        param.data.copy_(weight.detach())
    for one, other in ((model, optimizer), (again, resumed)):
        train_flat(one, other, 3, STEPS)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        for name, value in optimizer.state[theirs].items():
            assert resumed.state[mine][name].dtype == value.dtype and torch.equal(
                resumed.state[mine][name], value
            ), name


def clipping_under_fsdp2(mode, folder):
    model, optimizer = sharded(mode)
    alone = build(mode)
    plain = optimizer_of(alone, mode)
    optimizer.max_grad_norm = plain.max_grad_norm = 0.1
    train(model, optimizer, 0, 3)
    train(alone, plain, 0, 3)
    assert plain.grad_norm > 0.1 and torch.equal(optimizer.grad_norm, plain.grad_norm)
    assert_same_bits(snapshot(model, optimizer), snapshot(alone, plain))


def gradients_that_lie_otherwise(mode, folder):
    """Backward leaves partial sums for a norm under sequence parallelism, and a whole gradient for
    rows that do not divide evenly; the norm to clip by is that of whole gradients too."""
    dtype, options = MODES[mode]
    mesh = init_device_mesh("cpu", (WORLD,))
    options = {**options, "seed": 3, "max_grad_norm": 0.1}
    for placed, lies in (
        (Replicate(), Partial()),
        (Shard(0), Replicate()),
        (Shard(0), Partial()),
    ):
        torch.manual_seed(1)
        value = torch.randn(7, 4).to(dtype)
        plain = torch.nn.Parameter(value.clone())
        parts = torch.nn.Parameter(distribute_tensor(value, mesh, [placed]))
        optimizers = AdamW([plain], **options), AdamW([parts], **options)
        for step in range(3):
            grad = torch.randn(7, 4, generator=torch.Generator().manual_seed(step)).to(dtype)
            plain.grad = grad
            halves = DTensor.from_local(grad / WORLD, mesh, [Partial()])
            parts.grad = halves.redistribute(placements=[lies])
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(optimizers[1].grad_norm, optimizers[0].grad_norm)
        assert torch.equal(parts.full_tensor(), plain), (placed, lies)


CHECKS = [
    any_placement,
    gradients_that_lie_otherwise,
    long_vector,
    states_on_another_device_than_the_mesh,
    flat_parameters_of_fsdp1,
    clipping_under_fsdp2,
    under_ddp,
    under_fsdp2,
    sharded_after_construction,
    fp32_weights_under_fsdp2,
    checkpoint_of_one_process,
    checkpoint_of_two_processes,
    full_state_from_rank_0,
]


def rank_main(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results = {}
    for check in CHECKS:
        for mode in MODES:
            try:
                check(mode, folder)
                results[check.__name__, mode] = ""
            except Exception:
                results[check.__name__, mode] = traceback.format_exc()
            dist.barrier()
    torch.save(results, f"{folder}/results-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for mode in MODES:
        for flatten in (False, True):
            save(*undisturbed(mode, steps=3), folder / f"one-{mode}-{flatten}", flatten)
    torch.multiprocessing.spawn(rank_main, args=(str(folder),), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_processes_equal_one(check, mode, ranks):
    for rank in range(WORLD):
        failure = torch.load(ranks / f"results-{rank}")[check, mode]
        assert not failure, f"rank {rank}: {failure}"


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_one_process_loads_what_two_saved(mode, flatten, ranks):
    model = build(mode)
    optimizer = optimizer_of(model, mode, seed=6)
    load(model, optimizer, ranks / f"two-{mode}-{flatten}", flatten)
    train(model, optimizer, 3, STEPS)
    assert_same_bits(snapshot(model, optimizer), snapshot(*undisturbed(mode)))
