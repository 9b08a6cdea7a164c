"""Tokens a second, MFU, memory and time of a training in Trainer's own log."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from fastft.checks import boolean
from fastft.flops.document_alone import more_than_tokens
from fastft.flops.document_flops import DocumentFlops, FlopsUnknownError, document_flops
from fastft.foreign.compiling import is_compiled
from fastft.foreign.engines import rows_are_cut, same_batch_ranks
from fastft.foreign.models import base_model
from fastft.foreign.sharding import world_size
from fastft.integrations.batch_counts import BatchCounts, Totals, count_batch
from fastft.integrations.peak_flops import peak_flops
from fastft.integrations.process_memory import highest
from fastft.integrations.run_record import calling_handler, put_first, record_run, reports_of
from fastft.integrations.stopwatch import Stopwatch

# below "transformers", so that its verbosity rules
logger = logging.get_logger(f"transformers.{__name__}")

_SPANS = ("data", "forward", "backward", "step")
_SUMS = ("tokens", "places", "supervised", "labelled", "flops", "causal_flops", "uncounted")


class ThroughputCallback(TrainerCallback):
    """Adds to each of Trainer's logs how fast a training is, and what it spends its time on.

    The figures are in `trainer.state.log_history`, and in what Trainer reports to (TensorBoard,
    W&B, MLflow, the progress bar), beside `loss`. They are of the steps since the log before, of
    all processes, without the time of evaluations, saving and logging:

    | key | what |
    |---|---|
    | `tokens_per_second` | tokens that are not padding |
    | `supervised_tokens_per_second` | those with a label that counts |
    | `padding_share` | padding among all places of the batches |
    | `ignored_share` | tokens without a label that counts, among those that are not padding |
    | `tflops_per_device` | model TFLOP/s of each process: attention within documents, whole |
    | `causal_tflops_per_device` | attention counted only for what its mask lets through |
    | `mfu`, `causal_mfu` | shares of these in what the device promises |
    | `peak_memory_gib` | of the process: its device's memory, or without one its own |
    | `data_share`, `forward_share`, `backward_share`, `step_share` | of the time |
    | `fused_losses` | losses that were fused, with a callback of fastft's |
    | `materialised_places` | places that have asked for real logits in this training |

    What is not known is left out, and said once. No micro-step waits for a device or for another
    process: tokens are summed up where they are, and read when Trainer reads its loss.

    Args:
        peak_flops: FLOP/s that a device promises in the training's dtype, for MFU; None takes the
            data sheet's, for the GPUs whose name is known.
        flops: False counts no operations, which takes some seconds in the first step.

    Raises:
        ValueError: `peak_flops` is not positive.
        TypeError: `peak_flops` is no number, or `flops` no bool.

    An exception out of `train()` leaves two hooks on the model, because Trainer then calls no
    callback: `restore()` takes them off, and so does the next training with this callback.
    """

    def __init__(self, peak_flops: float | None = None, flops: bool = True) -> None:
        if not isinstance(peak_flops, int | float | None):
            raise TypeError(f"peak_flops must be a number of FLOP/s, got {peak_flops!r}")
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops must be positive FLOP/s, got {peak_flops!r}")
        self.peak_flops, self.flops = peak_flops, boolean("flops", flops)
        self._kept = contextlib.ExitStack()
        self._counting: _Counting | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to count, after `restore()`: auto_find_batch_size begins again without an end."""
        self.restore()
        reason = _why_not(args)
        if reason is not None:
            logger.warning(f"fastft: no throughput is logged: {reason}")
            return
        model, handler = kwargs["model"], calling_handler()
        self._counting = counting = _Counting(model, args, self.peak_flops, self.flops, handler)
        enter, leave = counting.enter, counting.leave
        if args.torch_compile or is_compiled(model):
            enter, leave = torch.compiler.disable(enter), torch.compiler.disable(leave)
        self._kept.callback(record_run(model, args))
        self._kept.callback(model.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._kept.callback(model.register_forward_hook(leave).remove)
        if handler is not None:
            self._kept.callback(put_first(handler, _Writer(counting)))

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is between epochs is not training."""
        self._between_steps()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The batches of this step are here."""
        if self._counting is not None:
            self._counting.is_due = False
            self._counting.watch.begin("forward")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The next micro-step begins."""
        if self._counting is not None:
            self._counting.watch.begin("forward")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are there, and clipped."""
        if self._counting is not None:
            self._counting.watch.begin("step")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whatever comes now, unless an event says otherwise, is the wait for the next batches."""
        if self._counting is not None:
            self._counting.is_due = True
            self._counting.watch.begin("data")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes what `_Writer`, which comes before the others, has not written."""
        if self._counting is not None:
            self._counting.write(state, logs)
        self._between_steps()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An evaluation is not training."""
        self._between_steps()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nor is a checkpoint."""
        self._between_steps()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves no trace."""
        self.restore()

    def _between_steps(self) -> None:
        """Does not count the time since the step's end; the next batches are waited for now."""
        if self._counting is not None:
            self._counting.watch.discard()
            self._counting.watch.begin("data")

    def restore(self) -> None:
        """Takes model and Trainer back to what they were. Harmless when called twice."""
        self._kept.close()
        self._counting = None


class _Writer(TrainerCallback):
    """Writes the figures into Trainer's logs before other callbacks report them."""

    def __init__(self, counting: _Counting) -> None:
        self.counting = counting

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.counting.write(state, logs)


class _Counting:
    """What is counted of one training."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        peak: float | None,
        flops: bool,
        handler: CallbackHandler | None,
    ) -> None:
        self.model, self.args, self.flops, self.handler = model, args, flops, handler
        base = base_model(model)
        self.beside = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        # as Trainer finds it out
        of_causal_lm = LOSS_MAPPING.get(getattr(base, "loss_type", "")) is ForCausalLMLoss
        self.shifts = of_causal_lm and not self.beside
        self.peak = peak or peak_flops(args.device, _working_dtype(args, model))
        self.watch, self.totals = Stopwatch(args.device), Totals()
        self.is_due = False  # a step has ended, and no log has come since
        self.document: DocumentFlops | None = None
        self.trained: list[bool] | None = None  # of which parameters `document` knows it
        self.fused = 0
        self.said: set[str] = set()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: counts its batch."""
        if not module.training or not torch.is_grad_enabled():
            return
        self.watch.begin("forward")
        counts = count_batch(kwargs, self.beside, self.shifts)
        if counts is None:
            self.say("the model is called without input_ids: its tokens are not counted")
            return
        self._add_tokens(counts)
        if self.flops:
            self._add_flops(counts, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward pass."""
        if module.training and torch.is_grad_enabled():
            self.watch.begin("backward")

    def _add_tokens(self, counts: BatchCounts) -> None:
        sides = [side.sum() for side in (counts.tokens, counts.outputs) if side is not None]
        for tokens in sides:
            self.totals.add("tokens", tokens)
        self.totals.add("places", counts.places)
        if counts.supervised is not None:
            self.totals.add("supervised", counts.supervised)
            self.totals.add("labelled", sides[-1])

    def _add_flops(self, counts: BatchCounts, inputs: dict[str, Any]) -> None:
        document = self._document(inputs)
        if document is None:
            self.totals.add("uncounted", 1)
            return
        # Apple's GPUs have no float64
        dtype = torch.float32 if counts.tokens.device.type == "mps" else torch.float64
        tokens = counts.tokens.to(dtype)
        outputs = None if counts.outputs is None else counts.outputs.to(dtype)
        self.totals.add("flops", document.whole(tokens, outputs).sum())
        self.totals.add("causal_flops", document.causal(tokens, outputs).sum())

    def _document(self, inputs: dict[str, Any]) -> DocumentFlops | None:
        """What a document costs; None where nobody knows. Counted once for what is trained."""
        others = more_than_tokens(inputs)
        if others:
            self.say(f"FLOPs of batches with {', '.join(others)} are not counted, nor MFU")
            return None
        if self.trained is None:
            self.watch.begin(None)
            self.trained, self.document = _what_is_trained(self.model), None
            try:
                self.document = document_flops(self.model, inputs)
            except FlopsUnknownError as error:
                self.say(f"FLOPs are not counted, nor MFU: {error}")
            self.watch.begin("forward")
        return self.document

    def write(self, state: TrainerState, logs: dict[str, Any] | None) -> None:
        """Adds the figures to a log of Trainer's own, which all processes write."""
        if not self.is_due or logs is None or not {"loss", "learning_rate"} <= logs.keys():
            return
        self.is_due = False
        figures = self._figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        if self.trained is not None and self.trained != _what_is_trained(self.model):
            self.trained = None

    def _figures(self) -> dict[str, float]:
        sums = {**dict.fromkeys((*_SUMS, *_SPANS), 0.0), **self.totals.read(), **self.watch.read()}
        sums = _of_all_processes(sums, self.args.device)
        shared, processes = same_batch_ranks(self.model, self.args), world_size()
        total = {name: sums[name] / shared for name in _SUMS}
        seconds = sum(sums[name] for name in _SPANS) / processes
        figures: dict[str, float] = {}
        if seconds and total["tokens"]:
            figures["tokens_per_second"] = total["tokens"] / seconds
            figures["padding_share"] = 1 - total["tokens"] / total["places"]
        if seconds and total["labelled"]:
            figures["supervised_tokens_per_second"] = total["supervised"] / seconds
            figures["ignored_share"] = 1 - total["supervised"] / total["labelled"]
        if seconds and total["flops"] and not total["uncounted"]:
            for prefix in ("", "causal_"):
                rate = total[f"{prefix}flops"] / seconds / processes
                figures[f"{prefix}tflops_per_device"] = rate / 1e12
                if self.peak:
                    figures[f"{prefix}mfu"] = rate / self.peak
        figures["peak_memory_gib"] = _peak_memory(self.args.device) / 2**30
        for name in _SPANS if seconds else ():
            figures[f"{name}_share"] = sums[name] / processes / seconds
        return {**figures, **self._losses()}

    def _losses(self) -> dict[str, float]:
        """What became of losses since the last time, where a callback of fastft's fuses them."""
        reports = reports_of(self.handler)
        if not reports:
            return {}
        before, self.fused = self.fused, sum(report.fused for report in reports)
        materialised = sum(len(report.materialised) for report in reports)
        return {"fused_losses": self.fused - before, "materialised_places": materialised}

    def say(self, sentence: str) -> None:
        """Warns, once."""
        if sentence not in self.said:
            self.said.add(sentence)
            logger.warning(f"fastft: {sentence}")


def _why_not(args: TrainingArguments) -> str | None:
    if args.n_gpu > 1:
        return "DataParallel cuts batches between threads; start one process for each GPU instead"
    if rows_are_cut():
        return "context or sequence parallelism cuts the rows of a batch between processes"
    return None


def _what_is_trained(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def _working_dtype(args: TrainingArguments, model: nn.Module) -> torch.dtype:
    """What products are computed in."""
    if args.bf16 or args.fp16:
        return torch.bfloat16 if args.bf16 else torch.float16
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(dtypes, torch.float32)


def _of_all_processes(sums: dict[str, float], device: torch.device) -> dict[str, float]:
    """Adds the numbers of all processes; the one collective, where Trainer gathers its loss too."""
    if world_size() == 1:
        return sums
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.tensor([*sums.values()], dtype=dtype, device=device)
    torch.distributed.all_reduce(numbers)
    return dict(zip(sums, numbers.tolist(), strict=True))


def _peak_memory(device: torch.device) -> int:
    """Bytes that the process has held at most: of a device's memory as torch gave it out, or of
    the host's."""
    of_device = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    if device.type != "cpu" and of_device is not None:
        return int(of_device(device))
    return highest()
