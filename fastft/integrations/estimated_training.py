"""One training of a model from its configuration, under a counter of live memory.

The training is Trainer's own: two steps and an evaluation, with the collator, the loss, the
optimizer and the clipping that are asked for. Under `Unallocated` it needs no memory and computes
nothing; under `LiveMemory` it is a real one, which says how far off the estimate is.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from fastft.data.collator import PackingCollator
from fastft.foreign.models import base_model
from fastft.integrations.clipping import fuse_clipping
from fastft.integrations.fused_loss import FusedLossCallback
from fastft.integrations.packing import PackingCallback
from fastft.integrations.probe.check_packing import Verdict
from fastft.integrations.steps_by_shapes import run_by_shapes
from fastft.live_memory import LiveMemory, Peak
from fastft.optim.adamw import AdamW
from fastft.optim.factory import adamw
from fastft.unallocated import FlashAttention, Unallocated

# how a class of transformers ends, and the collator's task
_TASKS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForConditionalGeneration": "seq2seq",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
}
_MODELS = {
    "causal_lm": (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    "seq2seq": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
    "masked_lm": (MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEPS = 2  # the second has the optimizer's states from its beginning


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        config: of the model.
        rows, tokens: of a batch.
        padding: the share of its tokens that is padding.
        dtype: of the weights, "fp32" or "bf16".
        autocast: compute in bf16, as Trainer's `bf16=True` does.
        checkpointing: as Trainer's `gradient_checkpointing`.
        accumulation: micro-steps of an optimizer step.
        lora: the rank of adapters on all linear layers; 0: all weights are trained.
        optim: Trainer's name of the optimizer that stock has.
        moments, rounding, offload, release_gradients: of fastft's AdamW.
        label_smoothing: as Trainer's `label_smoothing_factor`.
        attention: transformers' name of stock's attention; None: the model's own choice.
    """

    config: PreTrainedConfig
    rows: int = 1
    tokens: int = 1024
    padding: float = 0.0
    dtype: str = "fp32"
    autocast: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    lora: int = 0
    optim: str = "adamw_torch_fused"
    moments: str = "fp32"
    rounding: str = "exact"
    offload: str | None = None
    release_gradients: bool = False
    label_smoothing: float = 0.0
    attention: str | None = None

    def lengths(self) -> list[int]:
        """The tokens of each row without its padding: the first is full."""
        real = round(self.rows * self.tokens * (1 - self.padding))
        others = self.rows - 1
        shares = [(real - self.tokens + i) // others for i in range(others)]
        return [self.tokens, *shares]


@dataclass(frozen=True)
class Memory:
    """What a training holds at the peak of its steps, and of its evaluation."""

    training: Peak
    evaluation: Peak

    @property
    def bytes(self) -> int:
        """The higher of both."""
        return max(self.training.bytes, self.evaluation.bytes)

    @property
    def host(self) -> int:
        """On the host."""
        return max(self.training.host, self.evaluation.host)


def task_of(config: PreTrainedConfig) -> tuple[str, Any]:
    """What the configuration's model is trained for, and the class that makes it.

    Raises:
        ValueError: the model has no loss that fastft has a collator for.
    """
    for architecture in config.architectures or ():
        for ending, task in _TASKS.items():
            kind = getattr(transformers, architecture, None)
            encodes = task == "seq2seq" and not config.is_encoder_decoder
            if architecture.endswith(ending) and _reads_texts(kind) and not encodes:
                return task, kind
    for task, (mapping, kind) in _MODELS.items():
        of_task = type(config) in mapping and _reads_texts(mapping[type(config)])
        if of_task and (task == "seq2seq") == bool(config.is_encoder_decoder):
            return task, kind
    raise ValueError(
        f"a {config.model_type!r} model ({', '.join(config.architectures or ['no architecture'])}) "
        "is neither a language model nor a classifier of texts or tokens: there is no training "
        "to estimate"
    )


def _reads_texts(kind: Any) -> bool:
    return getattr(kind, "main_input_name", None) == "input_ids"


def measure(training: Training, pieces: frozenset[str], counter: LiveMemory) -> Memory:
    """Trains two steps and evaluates, with these pieces of fastft, under `counter`.

    Raises:
        ValueError: the model cannot be built or trained so.
        UnknownNumbers: from `Unallocated`: what the model computes depends on numbers.
    """
    task, kind = task_of(training.config)
    _check_positions(training)
    counter.classes = _classes(training.config) if task in _MODELS else 0
    attention = FlashAttention() if _imagined(counter) == "cuda" else contextlib.nullcontext()
    with counter, attention, tempfile.TemporaryDirectory() as folder:
        model = _model(training, kind)
        counter.tag("weights", _weights(model))
        if "packing" in pieces:
            _pack_attention(model, task)
        args = _arguments(training, folder)
        phases = _Phases(counter)
        own = "optimizer" in pieces
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=_examples(training, task, _STEPS * args.gradient_accumulation_steps),
            eval_dataset=_examples(training, task, 1),
            data_collator=_collator(training, task, "packing" in pieces),
            optimizers=_adamw(training, model, args, counter) if own else (None, None),
            callbacks=[*_callbacks(pieces), phases],
        )
        trainer.remove_callback(PrinterCallback)
        if own:
            fuse_clipping(trainer)
        trainer.train()
    return phases.memory()


class _Phases(TrainerCallback):
    """Tells the counter what goes on, and which tensors are gradients and optimizer states."""

    def __init__(self, counter: LiveMemory) -> None:
        self.counter = counter
        self._evaluation = 0
        self._end = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.counter.phase = "forward"
        if args.optim == "adamw_torch" and _imagined(self.counter) == "cuda":
            for group in kwargs["optimizer"].param_groups:
                group["foreach"] = True  # torch's default there, with copies of all gradients

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = (parameter.grad for parameter in kwargs["model"].parameters())
        self.counter.tag("gradients", (grad for grad in gradients if grad is not None))
        self.counter.phase = "step"

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        states = kwargs["optimizer"].state.values()
        entries = (entry for state in states for entry in state.values())
        self.counter.tag("optimizer", (entry for entry in entries if isinstance(entry, Tensor)))
        self.counter.phase = "forward"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == _STEPS:
            self.counter.phase, self._evaluation = "evaluation", self.counter.now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.counter.phase, self._end = "end", self.counter.now

    def memory(self) -> Memory:
        return Memory(
            self.counter.peak(0, self._evaluation), self.counter.peak(self._evaluation, self._end)
        )


class _UnprobedPacking(PackingCallback):
    """The probe compares outputs, and here there are no numbers."""

    def _verdict(self, model: nn.Module, batches: Any, args: Any, switch: bool) -> Verdict:
        return Verdict()


class _UnprobedLoss(_UnprobedPacking, FusedLossCallback):
    """Likewise."""


def _adamw(
    training: Training, model: nn.Module, args: TrainingArguments, counter: LiveMemory
) -> tuple[AdamW, None]:
    offload, releases = training.offload, training.release_gradients
    kept: dict[str, Any] = {"moments": training.moments, "rounding": training.rounding}
    tier: dict[str, Any] = {"offload": offload} if offload else {}
    tier |= {"release_gradients": True} if releases else {}
    if not isinstance(counter, Unallocated):
        return adamw(model, args, **kept, **tier)
    # raises where they do not go together
    AdamW([torch.zeros(1, dtype=torch.bfloat16)], seed=0, **kept, **tier)
    optimizer, schedule = adamw(model, args, **kept)
    run_by_shapes(optimizer, counter, offload, releases, training.accumulation)
    return optimizer, schedule


def _check_positions(training: Training) -> None:
    """A table of positions would be read past its end, which shapes do not show."""
    config = training.config.get_text_config()
    places = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "position_buckets", None)
    if places is not None and not rotary and training.tokens > places:
        raise ValueError(f"the model has {places} positions, a row {training.tokens} tokens")


def _imagined(counter: LiveMemory) -> str:
    """The type of the device whose memory is counted."""
    return counter.imagined.type if isinstance(counter, Unallocated) else "cpu"


def _classes(config: PreTrainedConfig) -> int:
    return int(getattr(config.get_text_config(), "vocab_size", 0))


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _model(training: Training, kind: Any) -> nn.Module:
    options: dict[str, Any] = {"dtype": _DTYPES[training.dtype]}
    if training.attention is not None:
        options["attn_implementation"] = training.attention
    if issubclass(kind, PreTrainedModel):
        model: nn.Module = kind._from_config(training.config, **options)
    else:
        model = kind.from_config(training.config, trust_remote_code=False, **options)
    if training.lora:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ValueError("--lora needs the package peft: pip install peft") from error
        model = get_peft_model(model, LoraConfig(r=training.lora, target_modules="all-linear"))
    return model.train()


def _pack_attention(model: nn.Module, task: str) -> None:
    if task == "sequence_classification":
        raise ValueError("packing of a classifier of whole texts is not estimated")
    base_model(model).set_attn_implementation("fastft")


def _arguments(training: Training, folder: str) -> TrainingArguments:
    names = TrainingArguments.__dataclass_fields__
    new = "activation_checkpointing"  # transformers 5.24
    checkpointing = new if new in names else "gradient_checkpointing"
    options: dict[str, Any] = {checkpointing: True} if training.checkpointing else {}
    return TrainingArguments(
        folder,
        max_steps=_STEPS,
        eval_strategy="steps",
        eval_steps=_STEPS,
        per_device_train_batch_size=training.rows,
        per_device_eval_batch_size=training.rows,
        gradient_accumulation_steps=min(training.accumulation, 2),  # later ones are as the second
        bf16=training.autocast,
        max_grad_norm=0.0 if training.release_gradients else 1.0,  # which it excludes
        optim=training.optim,
        label_smoothing_factor=training.label_smoothing,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )


def _callbacks(pieces: frozenset[str]) -> list[TrainerCallback]:
    if "loss" in pieces:
        return [_UnprobedLoss(attention=False)]
    return [_UnprobedPacking(attention=False)] if "packing" in pieces else []


def _examples(training: Training, task: str, batches: int) -> list[dict[str, Any]]:
    examples = []
    for length in training.lengths() * batches:
        ids = [1 + i % 7 for i in range(length)]
        label: Any = 0 if task == "sequence_classification" else ids
        if task == "token_classification":
            label = [0] * length
        examples.append({"input_ids": ids, "labels": label})
    return examples


def _collator(training: Training, task: str, packs: bool) -> Any:
    if not packs:
        return _padded
    config = training.config.get_text_config()
    start = getattr(config, "decoder_start_token_id", None)
    if task != "seq2seq":
        return PackingCollator(task=task)
    return PackingCollator(task=task, decoder_start_token_id=0 if start is None else start)


def _padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A stock collator's batch: a row for each example, padded to the longest."""
    longest = max(len(example["input_ids"]) for example in examples)

    def rows(key: str, padding: int) -> Tensor:
        values = [example[key] for example in examples]
        return torch.tensor([value + [padding] * (longest - len(value)) for value in values])

    batch = {"input_ids": rows("input_ids", 0)}
    lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
    batch["attention_mask"] = (torch.arange(longest) < lengths).long()
    if isinstance(examples[0]["labels"], list):
        return batch | {"labels": rows("labels", -100)}
    return batch | {"labels": torch.tensor([example["labels"] for example in examples])}
