"""The optimizer of a plugged Trainer: made when Trainer makes its own, out of Trainer's groups.

`Trainer.create_optimizer` calls the class of `optimizer_cls_and_kwargs` with its decay / no-decay
groups, and unpacks a mapping that reads `trainer.args` then. So whatever changes a model or `args`
before (adapters, resized embeddings, `model_init`, a search's trial, FSDP2, DeepSpeed) is in it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Trainer

from fastft.data.lengths import scan_lengths
from fastft.foreign import engines, loaders, objects
from fastft.integrations.clipping import can_be_inside, fuse_clipping
from fastft.integrations.weights_for_callbacks import follow_training
from fastft.optim.adamw import AdamW
from fastft.optim.factory import spec_of, with_fp32_moments
from fastft.optim.moment_codes import CODES
from fastft.optim.offload import tiers
from fastft.optim.offload.choice import Batch
from fastft.optim.origin import Keywords, Origin

# names in TrainingArguments.optim, and what of fastft's they are
_ADAMW: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adamw_bnb_8bit": {"moments": "8bit"},
    "adamw_8bit": {"moments": "8bit"},
    "adamw_torch_8bit": {"moments": "8bit"},
    "adamw_torch_4bit": {"moments": "4bit"},
    # whose states go to the host where the device has too little memory
    "paged_adamw_32bit": {"offload": "states"},
    "paged_adamw_8bit": {"moments": "8bit", "offload": "states"},
}
_OTHER_ADAMW = {
    "adamw_anyprecision": "its dtypes are in optim_args",
    "adamw_torch_xla": "it is for TPUs",
    "adamw_torch_npu_fused": "it is for NPUs",
}
_PLACES = {
    "states": "states on the host",
    "gradients": "states and gradients on the host",
    "overlap": "states and gradients on the host, each weight updated before its next forward",
    "auto": "on the host what does not fit the device when training begins",
}
_RELEASED = "each gradient used up in backward"
_GIB = 2**30
_MAKERS = ("create_optimizer", "create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs")


class PlugOrigin(Origin):
    """A call of `plug`: Trainer's groups become those of `fastft.adamw(model)`."""

    def __init__(
        self, trainer: Trainer, given: dict[str, Any], pieces: Sequence[str], packing: Any
    ) -> None:
        super().__init__("plug", trainer.args, given)
        self._trainer = weakref.ref(trainer)
        self._pieces, self._packing = tuple(pieces), packing

    def __getstate__(self) -> dict[str, Any]:
        """Ray sends a Trainer to its processes; no weak reference can be pickled."""
        return {**vars(self), "_trainer": self._trainer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._trainer = weakref.ref(state["_trainer"])

    def grouped(self, params: Iterable[Any]) -> Iterable[Any]:
        """Where moments are codes, embeddings and output head keep fp32 ones, in groups of their
        own."""
        params, trainer = list(params), self._trainer()
        if self.given.get("moments") not in CODES or trainer is None:
            return params
        if not all(isinstance(group, dict) for group in params):
            return params
        model: Any = trainer.model
        return with_fp32_moments(params, model)

    def training(self) -> dict[str, Any]:
        """The Trainer's model, and its batch where its longest row can be known."""
        trainer: Any = self._trainer()
        if trainer is None:
            return super().training()
        batch = _batch(trainer, self._packing)
        known = None if batch is None else Batch(*batch, self._pieces)
        return {"model": trainer.model, "args": self.args, "batch": known}


def _batch(trainer: Any, packing: Any) -> tuple[int, int] | None:
    """Rows, and tokens of the longest; None where nobody knows without reading all of a stream."""
    if isinstance(packing, int):
        return 1, packing
    dataset, rows = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if not (loaders.is_dataset(dataset) or isinstance(dataset, list)):
        return None
    try:
        longest = int(scan_lengths(dataset).max())
    except (ValueError, RuntimeError, KeyError, TypeError):  # of texts, e.g.
        return None
    most = getattr(trainer.args, "max_length", None)  # TRL's collators cut there
    return rows, min(longest, most) if isinstance(most, int) else longest


class OptimizerPiece:
    """What `plug` does for the optimizer.

    Args:
        trainer: a Trainer before `train()`.
        wanted: `optimizer` of `plug`.
        options: keywords of `AdamW`.
        loss, packing: of `plug`.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of its range, or beside an optimizer that is left alone.
    """

    def __init__(
        self,
        trainer: Trainer,
        wanted: bool,
        options: dict[str, Any],
        *,
        loss: bool = True,
        packing: int | str | None = None,
    ) -> None:
        self._trainer: Any = trainer
        self._spec: tuple[type[AdamW], Keywords] | None = None
        self._origin: PlugOrigin | None = None
        self._given = is_given(trainer)
        self._why_not = why_left_alone(trainer, self._given) if wanted else "off: optimizer=False"
        if options and (self._why_not or self._given):
            _refuse_options(options, self._why_not or "the Trainer has a fastft.AdamW already")
        if self._why_not is None and not self._given:
            _check_options(trainer, options)
            # a seed that AdamW drew for itself would leave dropout other numbers than stock's
            given = {"seed": trainer.args.seed, **_ADAMW[_optim(trainer.args)], **options}
            pieces = [*(["loss"] if loss else []), *(["packing"] if packing else [])]
            self._origin = PlugOrigin(trainer, given, pieces, packing)
            self._spec = spec_of(self._origin)
            self._origin.forget()  # until it is installed

    def install(self, stack: contextlib.ExitStack) -> None:
        """Hands the class and its keywords to the Trainer, until `stack` is closed."""
        if self._origin is not None:
            spec = objects.put_attributes(self._trainer, optimizer_cls_and_kwargs=self._spec)
            stack.callback(spec)
            self._origin.remember()
            stack.callback(self._origin.forget)

    def refresh(self) -> None:
        """Reads what `train()` may find changed since the last one."""
        if self._origin is not None:
            self._origin.args = self._trainer.args

    def train_begins(self, stack: contextlib.ExitStack) -> None:
        """Clips inside the step of the accelerator of this training, until `stack` is closed."""
        if self._why_not is None:
            stack.callback(fuse_clipping(self._trainer))
            trainer = self._trainer
            follow_training(trainer.args, trainer.model, trainer.optimizer, stack)

    def line(self) -> str:
        """What optimizer trains, and how."""
        if self._why_not is not None:
            return self._why_not
        trainer = self._trainer
        made = engines.inner_optimizer(trainer.optimizer)
        if made is not None and not isinstance(made, AdamW):
            kind = f"{type(made).__module__}.{type(made).__name__}"
            return f"left alone: {kind} trains, though fastft's AdamW was handed over"
        keywords = {} if self._spec is None else dict(self._spec[1])
        moments = keywords.get("moments", "fp32") if made is None else made.defaults["moments"]
        rounding = keywords.get("rounding", "exact") if made is None else made.rounding
        words = ["AdamW as it was given" if self._given else "AdamW"]
        trained = {param.dtype for param in trainer.model.parameters() if param.requires_grad}
        if torch.bfloat16 in trained:
            words[0] += f" {rounding} bf16"
        if moments in CODES:
            kept = "" if self._given else ", those of embeddings and head fp32"
            words.append(f"{moments.removesuffix('bit')}-bit moments{kept}")
        elif moments != "fp32":
            words.append(f"{moments} moments")
        words += self._places(made, keywords)
        # of these names torchao's alone reads any: its blocks and its rounding
        of_torchao = _optim(trainer.args) in ("adamw_torch_8bit", "adamw_torch_4bit")
        if of_torchao and trainer.args.optim_args:
            words.append(f"without {trainer.args.optim_args} (optim_args), which are torchao's")
        return ", ".join([*words, self._clipping()])

    def _places(self, made: AdamW | None, keywords: dict[str, Any]) -> list[str]:
        """What is on the host, and how much of it."""
        if made is None:
            offload = keywords.get("offload")
            released = keywords.get("release_gradients", False)
            return [_PLACES[offload]] if offload else [_RELEASED] if released else []
        if made.release_gradients:
            return [_RELEASED]
        words = []
        if made.offload is not None:
            size = tiers.bytes_of(made.param_groups, made.rounding, made.offload)
            words = [
                f"{_PLACES[made.offload]}: {_said(size.host)}, beside {_said(size.device)} on the "
                "device"
            ]
        if made.choice is not None:
            words.append(f"chosen by offload='auto': {made.offload!r}, {made.choice.why}")
        return words

    def _clipping(self) -> str:
        if not self._trainer.args.max_grad_norm:
            return "no clipping"
        if can_be_inside(self._trainer.accelerator):
            return "clipping inside"
        return "clipping by Trainer, as gradients lie in flat parts"


def _said(size: int) -> str:
    """Bytes, as the log has them."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB // 10 else f"{size / 2**20:.1f} MiB"


def is_given(trainer: Trainer) -> bool:
    """Whether the user has handed this Trainer an AdamW of fastft's."""
    if trainer.optimizer is not None:
        return isinstance(engines.inner_optimizer(trainer.optimizer), AdamW)
    given = trainer.optimizer_cls_and_kwargs
    return given is not None and isinstance(given[0], type) and issubclass(given[0], AdamW)


def why_left_alone(trainer: Trainer, given: bool) -> str | None:
    """Why this Trainer keeps its own optimizer, as a line; None where fastft's AdamW fits."""
    return None if given else next(filter(None, _reasons(trainer)), None)


def _reasons(trainer: Any) -> Iterable[str | None]:
    args, left = trainer.args, "left alone:"
    if trainer.optimizer is not None:
        kind = type(engines.inner_optimizer(trainer.optimizer)).__name__
        yield f"{left} the Trainer has a {kind} already (optimizers=, or an earlier train())"
    if trainer.optimizer_cls_and_kwargs is not None:
        kind = getattr(trainer.optimizer_cls_and_kwargs[0], "__name__", "factory")
        yield f"{left} optimizer_cls_and_kwargs= chose {kind}"
    maker = next((name for name in _MAKERS if _is_overridden(trainer, name)), None)
    if maker is not None:
        yield f"{left} {type(trainer).__name__} has a {maker} of its own"
    if args.optim_target_modules is not None:
        yield f"{left} args.optim_target_modules chooses what it trains"
    name = _optim(args)
    if name not in _ADAMW:
        yield f"{left} args.optim is {name!r}{_comment(name)}"
    config = engines.engine_config(trainer.accelerator)
    if "optimizer" in config:
        yield f"{left} DeepSpeed's configuration has an optimizer of its own"
    if engines.replaces_optimizers(config):
        yield (
            f"{left} DeepSpeedCPUAdam trains where ZeRO offloads the optimizer; "
            '"zero_force_ds_cpu_optimizer": false in its configuration lets fastft\'s train'
        )
    dtypes = {param.dtype for param in trainer.model.parameters() if param.requires_grad}
    others = sorted(str(dtype) for dtype in dtypes - {torch.float32, torch.bfloat16})
    if others:
        yield f"{left} it trains float32 and bfloat16, the model has {', '.join(others)}"


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _comment(name: str) -> str:
    return f": {_OTHER_ADAMW[name]}" if name in _OTHER_ADAMW else ""


def _is_overridden(trainer: Trainer, name: str) -> bool:
    kinds = type(trainer), Trainer
    return name in vars(trainer) or getattr(kinds[0], name) is not getattr(kinds[1], name)


def _refuse_options(options: dict[str, Any], why: str) -> None:
    raise ValueError(
        f"an option for fastft's AdamW ({', '.join(options)}), which plug does not make here "
        f"({why}): leave it out, or let plug make the optimizer: "
        "TrainingArguments(optim='adamw_torch'), optimizer=True, and no optimizer of your own"
    )


def _check_options(trainer: Trainer, options: dict[str, Any]) -> None:
    """Raises for what Trainer's own arguments say; the rest is AdamW's to check."""
    if options.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']!r}: plug clips inside the step to the "
            f"max_grad_norm of args, which is {trainer.args.max_grad_norm}: set it there, "
            "TrainingArguments(max_grad_norm=...)"
        )
    for name in ("params", "_origin"):
        if name in options:
            raise TypeError(f"{name} is no option of plug: Trainer makes the parameter groups")
