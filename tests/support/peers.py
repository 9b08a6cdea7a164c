"""Trainings of two processes of which one dies or stalls, and the relay that is between them.

`Peers(folder, kind).run(...)` starts one process a rank on this file, without a launcher, which
would end the other, and returns how each ended. The processes meet at a `Relay`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

PROCESSES, STEPS, SAVED, LIMIT = 2, 6, 2, 30  # the limit of a collective in seconds


class Relay:
    """Hands on what comes to `port` to the port `to`, each piece after `delay` seconds, while it is
    `open`: else nothing arrives, and no connection is closed."""

    def __init__(self, to: int, delay: float) -> None:
        self.to, self.delay, self.open = to, delay, True
        self.door = socket.create_server(("127.0.0.1", 0))
        self.port = self.door.getsockname()[1]
        self._start(self._accept)

    def _start(self, *work) -> None:
        threading.Thread(target=work[0], args=work[1:], daemon=True).start()

    def _accept(self) -> None:
        while True:
            one, _ = self.door.accept()
            other = self._connected()
            self._start(self._pass_on, one, other)
            self._start(self._pass_on, other, one)

    def _connected(self) -> socket.socket:
        while True:  # the process behind it may not listen yet
            try:
                return socket.create_connection(("127.0.0.1", self.to))
            except ConnectionRefusedError:
                time.sleep(0.1)

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while piece := one.recv(1 << 16):
                time.sleep(self.delay)
                if self.open:
                    other.sendall(piece)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # an end that has died


class Ended(NamedTuple):
    """How a process ended: its exit status, what it wrote, seconds after the first that ended."""

    status: int | None  # None: it had to be killed
    output: str
    seconds: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as door:
        return door.getsockname()[1]


def run(folder: Path, *options: str, kind: str = "ddp", delay: float = 0.0) -> list[Ended]:
    """A training by each rank, which writes to `folder`; what came of them.

    Args:
        folder: of the checkpoints, and of `rank.pt`, what a rank found.
        options: "die", "stall" or "refuse" (what the last rank does in the middle), "resume".
        kind: "ddp": Trainer with all that `plug` has; "tensor parallel": a loop.
        delay: of the relay between the ranks and the store where they meet.
    """
    folder.mkdir(exist_ok=True)
    (folder / "stalled").unlink(missing_ok=True)
    port = free_port()
    relay = Relay(port, delay)
    here = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    common = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1"}
    children = []
    for rank in range(PROCESSES):
        # the first rank has the store, the others come to it through the relay
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": relay.port if rank else port}
        with open(folder / f"{rank}.log", "w") as log:
            command = [sys.executable, __file__, kind, str(folder), *options]
            environment = common | {name: str(value) for name, value in own.items()}
            children.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return _ends(children, folder, relay)


def _ends(children: list[subprocess.Popen], folder: Path, relay: Relay) -> list[Ended]:
    begin, stopped, ended = time.monotonic(), None, {}
    while len(ended) < len(children) and time.monotonic() < begin + 1200:
        time.sleep(0.2)
        stalled = (folder / "stalled").exists()
        if stopped is None and (ended or stalled):
            stopped = time.monotonic()
            relay.open = not stalled
        for rank, child in enumerate(children):
            if rank not in ended and child.poll() is not None:
                ended[rank] = child.returncode, time.monotonic() - (stopped or time.monotonic())
        if stalled and 0 in ended:  # the other never ends by itself
            break
    found = []
    for rank, child in enumerate(children):
        child.kill()
        child.wait()
        status, seconds = ended.get(rank, (None, float("inf")))
        found.append(Ended(status, (folder / f"{rank}.log").read_text(), seconds))
    return found


def _middle(options: list[str]) -> None:
    """What the last rank does to itself in the middle of a training."""
    if int(os.environ["RANK"]) < PROCESSES - 1:
        return
    if "die" in options:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stall" in options:
        Path(options[0], "stalled").touch()
        os.kill(os.getpid(), signal.SIGSTOP)


def _ddp(folder: Path, options: list[str]) -> dict[str, torch.Tensor]:
    import transformers

    import fastft
    from support.plugged import trainer_of

    class Middle(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == SAVED + 1:
                _middle([str(folder), *options])

    saving = {"save_strategy": "steps", "save_steps": SAVED}
    changes = {"max_steps": STEPS, "learning_rate": 1e-2, "seed": 3, **saving}
    trainer = trainer_of(folder, "causal", **changes)
    trainer.add_callback(Middle())
    if "refuse" in options:
        trainer.data_collator = fastft.PackingCollator()
        trainer.add_callback(fastft.FusedLossCallback())
        if os.environ["RANK"] != "0":  # on this rank alone packed sequences see each other
            layer = trainer.model.model.layers[0]
            layer.register_forward_hook(lambda module, args, output: output + output.mean(1, True))
    else:
        fastft.plug(trainer, packing=40)
    trainer.train(resume_from_checkpoint="resume" in options)
    assert trainer.state.global_step == STEPS
    return {name: value.detach() for name, value in trainer.model.named_parameters()}


def _tensor_parallel(folder: Path, options: list[str]) -> dict[str, torch.Tensor]:
    """Collectives of fastft's own: of a head's classes, and of the norm of gradients."""
    import torch.nn.functional as F
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    import fastft

    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 31, bias=False))
    model.get_output_embeddings = lambda: model[1]
    parallelize_module(model, mesh, {"1": ColwiseParallel(output_layouts=Replicate())})
    optimizer = fastft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.1)
    with fastft.fused_loss(model) as report:
        for step in range(STEPS):
            x = torch.randn(9, 8, generator=torch.Generator().manual_seed(step))
            loss = F.cross_entropy(model(x), torch.arange(9))
            if step == SAVED:
                _middle([str(folder), *options])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert report.fused == STEPS
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value.detach()
        for name, value in model.named_parameters()
    }


KINDS = {"ddp": _ddp, "tensor parallel": _tensor_parallel}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # where Trainer makes the group, with use_cpu=True, it has torch's 30 minutes: transformers
    # hands `ddp_timeout` on for accelerators alone
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT))
    kind, folder, *options = sys.argv[1:]
    found = KINDS[kind](Path(folder), options)
    torch.save(found, Path(folder) / f"{os.environ['RANK']}.pt")
    # without which gloo aborts now and then at the interpreter's end
    dist.destroy_process_group()
