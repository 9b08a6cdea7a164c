"""Every way of training, and the mark by which a test proves what fastft does in one.

    @pytest.mark.way("DDP", loss="exact", optimizer="exact")

A way is a row of the table in `docs/works-with.md`, the piece of fastft its column, a word of
`WORDS` its cell. A test may have several marks, and several tests may prove one cell, by the same
word. Another row begins here: a `Way` in its section. `ways_table.py` records what came of the
tests, and writes the table.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

import pytest

COLUMNS = {"loss": "loss", "optimizer": "AdamW", "packing": "packing"}
WORDS = {
    "exact": "equals stock, or unpacked batches, within the rounding of fp32",
    "works": "compared with stock, within a rounding that the documentation tells (bf16)",
    "stock": "left as stock has it, and a sentence says so",
    "refused": "an error before training, with the way out",
    "no vocabulary": "the model has no logits over a vocabulary that could be left out",
}


class Way(NamedTuple):
    """A row: its name, what is said beside it, and its row in the README's short table, which
    several may share ("": in none).

    `worked` has the columns that were once found to work by hand, which no cell may fall behind.
    """

    name: str
    note: str = ""
    short: str = ""
    worked: str = "loss optimizer"


_ADAPTERS = "LoRA, DoRA, IA3 and other adapters of PEFT"
_HEAD_ADAPTERS = "adapters on the output head"
_QUANTISED = "quantised bases: bitsandbytes, torchao"
_PREFERENCE = "TRL: DPO, KTO, GRPO, RLOO"
_EXPERIMENTAL = "TRL: ORPO, CPO, SimPO, GKD"
_ENCODERS = "classifiers, taggers, question answering"
_IMAGES = "image-text models"
_FSDP = "FSDP1, FSDP2"
_ZERO = "DeepSpeed ZeRO-1, 2, 3"
_SEARCH = "Optuna, Ray Tune"
_LOOPS = "loops of one's own: torch, Accelerate, Lightning"
_LOGGERS = "TensorBoard, W&B, MLflow"
_RESUME = "resuming, killed or not"
_OFFLOAD = "AdamW's `offload`: states, gradients on the host"
_BF16 = "bf16, as autocast or parameters"
_USUAL = "other settings of Trainer"

SECTIONS = {
    "Tasks and models": [
        Way(
            "causal language models",
            "[365 of 385 classes](../benchmarks/results/architectures.md) exact and fused, none "
            "wrong; [188 of 272](../benchmarks/results/packing.md) packed, 84 refused",
            "language models, causal, masked and seq2seq",
            "loss optimizer packing",
        ),
        Way("masked language models", "", "language models, causal, masked and seq2seq"),
        Way("T5, BART and their kind", "", "language models, causal, masked and seq2seq"),
        Way("sequence classification", "", _ENCODERS),
        Way("regression, several labels", "", _ENCODERS),
        Way("sequence classification on decoders", "55 classes packed", _ENCODERS),
        Way("reward models", "one label and a `score` head, with plain Trainer", _ENCODERS, ""),
        Way("classifiers with states, or an encoder beside", "Jamba, T5", "", ""),
        Way("token classification", "", _ENCODERS),
        Way("question answering", "", _ENCODERS),
        Way("multiple choice", "", _ENCODERS),
        Way("`predict_with_generate`"),
    ],
    "Adapters and quantised bases": [
        Way("LoRA", "", _ADAPTERS, "loss optimizer packing"),
        Way("rsLoRA", "", _ADAPTERS),
        Way("PiSSA", "", _ADAPTERS),
        Way("DoRA", "", _ADAPTERS),
        Way("IA3", "", _ADAPTERS),
        Way("LoHa", "", _ADAPTERS),
        Way("OFT", "", _ADAPTERS),
        Way("VeRA", "", _ADAPTERS),
        Way("trainable tokens", "", _ADAPTERS),
        Way("`modules_to_save`", "", _ADAPTERS),
        Way("`target_parameters`", "", _ADAPTERS),
        Way("LoRA with biases", "", _ADAPTERS),
        Way(
            "other methods of PEFT",
            "LoKr, AdaLoRA, PVeRA, BOFT, HRA, FourierFT, WaveFT, MiSS, RandLoRA, VB-LoRA, "
            "Uni-LoRA, SHiRA, HiRA, GLoRA, PSOFT, Lily (not packed), BEFT, C3A, RoAd, GraLoRA, "
            "DeLoRA, FRoD, norms",
            _ADAPTERS,
            "",
        ),
        Way("LoRA on the head", "", _HEAD_ADAPTERS),
        Way("LoRA in fp32 on a bf16 head", "", _HEAD_ADAPTERS, ""),
        Way("DoRA on the head", "", _HEAD_ADAPTERS),
        Way("IA3 on the head", "", _HEAD_ADAPTERS),
        Way(
            "other methods on the head",
            "all of the above but the next row's; C3A and GraLoRA have T x V numbers of their own",
            _HEAD_ADAPTERS,
            "",
        ),
        Way("RoAd, DeLoRA, FRoD on the head", "the logits are built", "", ""),
        Way("prompt tuning", "", "prompt, prefix and p-tuning"),
        Way("prefix tuning", "", "prompt, prefix and p-tuning"),
        Way("p-tuning", "", "prompt, prefix and p-tuning", ""),
        Way("several adapters", "switched, mixed in a batch, merged, as reference", _ADAPTERS),
        Way("QLoRA nf4 (bitsandbytes)", "", _QUANTISED),
        Way("LLM.int8 (bitsandbytes)", "", _QUANTISED),
        Way("a 4-bit head (bitsandbytes)", "", _QUANTISED, ""),
        Way("an 8-bit head (bitsandbytes)", "", "", ""),
        Way("torchao int8 weight-only", "", _QUANTISED, "optimizer"),
        Way("torchao int4 and float8 weight-only", "", _QUANTISED, ""),
        Way("a head quantised by torchao", "", "", ""),
        Way(
            "torchao QAT",
            "rounding to 4 bits makes steps of differences in last bits",
            _QUANTISED,
            "optimizer",
        ),
    ],
    "Preference and reinforcement": [
        Way("SFT (TRL)", "", "TRL: SFT", "optimizer"),
        Way("SFT (TRL), label smoothing", "", "", "loss optimizer"),
        Way("SFT (TRL), PEFT", "", "", "optimizer"),
        Way("DPO (TRL)", "", _PREFERENCE, "optimizer"),
        Way("KTO (TRL)", "", _PREFERENCE, "optimizer"),
        Way("GRPO (TRL)", "", _PREFERENCE, "optimizer"),
        Way("RLOO (TRL)", "", _PREFERENCE, ""),
        Way("Reward (TRL)", "", "TRL: reward models", "optimizer"),
        Way("ORPO (TRL)", "", _EXPERIMENTAL, ""),
        Way("CPO (TRL)", "", _EXPERIMENTAL, ""),
        Way("SimPO (TRL)", "", _EXPERIMENTAL, ""),
        Way("GKD (TRL)", "", _EXPERIMENTAL, ""),
        Way("TPO, GOLD, SDFT, A*-PO, Online DPO (TRL)", "no logits either", "", ""),
        Way("SDPO (TRL)", "its top-k tail magnifies rounding", "", ""),
        Way("distillation (TRL)", "", "", ""),
        Way("a loss of one's own over logits", "`compute_loss_func`", "", "loss"),
    ],
    "Vision and speech": [
        Way("image classification", "ViT", _ENCODERS),
        Way(
            "LLaVA and its kind",
            "[every class](../benchmarks/results/packing-images.md)",
            _IMAGES,
            "loss optimizer packing",
        ),
        Way("Qwen2-VL and its kind", "positions of several axes", _IMAGES),
        Way("Gemma3, PaliGemma", "tokens of an image see each other", _IMAGES),
        Way("Qwen3.5", "recurrent layers, without their kernels", "", ""),
        Way("Whisper", "also Moonshine, Cohere ASR, Canary", "speech: Whisper"),
        Way("Speech2Text, Moonshine streaming", "they count positions along a row", "", ""),
    ],
    "Many processes": [
        Way("DDP", "", "DDP", "loss optimizer packing"),
        Way("DataParallel", "start one process for each GPU instead", "", ""),
        Way("FSDP1", "a whole state dict dies in torch on a CPU: sharded ones are tested", _FSDP),
        Way("FSDP2", "", _FSDP),
        Way("FSDP2 + CPU offload", "", _FSDP, ""),
        Way("FSDP, a loss outside the model's forward", "label smoothing, or your own", "", ""),
        Way("DDP, states on the host", "", "", ""),
        Way("DDP, gradients on the host", "states can be there", "", ""),
        Way("FSDP2, states on the host", "", "", ""),
        Way("FSDP2, gradients on the host", "", "", ""),
        Way("DeepSpeed ZeRO-0", "", "", "loss optimizer"),
        Way("DeepSpeed ZeRO-1", "", _ZERO, "loss optimizer"),
        Way("DeepSpeed ZeRO-2", "", _ZERO, "loss optimizer"),
        Way("DeepSpeed ZeRO-3", "", _ZERO, "loss optimizer"),
        Way("DeepSpeed ZeRO + optimizer offload", "DeepSpeedCPUAdam trains", "", "loss"),
        Way(
            "DeepSpeed ZeRO + optimizer offload, fastft's AdamW kept",
            "`zero_force_ds_cpu_optimizer: false`",
            "",
            "",
        ),
        Way("accelerate loop, DDP", "", _LOOPS, ""),
        Way("accelerate loop, FSDP1", "", "", ""),
        Way("accelerate loop, FSDP2", "", "", ""),
        Way("accelerate loop, DeepSpeed", "", "", ""),
        Way("accelerate loop, states on the host", "", "", ""),
        Way("accelerate loop, gradients on the host", "", "", ""),
        Way("resume under each engine", "to the bit where stock's is", "", ""),
        Way("`merge_fsdp_weights`", "", "", ""),
        Way("tensor parallel", "", "tensor parallel", ""),
        Way("FSDP2 with tensor parallel", "", "tensor parallel", ""),
        Way("context parallel", "`cp_size`: needs a GPU", "sequences cut between processes", ""),
        Way(
            "sequence parallel (DeepSpeed)",
            "ALST or Ulysses, `sp_size`",
            "sequences cut between processes",
            "",
        ),
        Way("Ray Train", "", "Ray Train"),
        Way("`torchrun`", "", "", ""),
        Way("`accelerate launch`", "its configuration files, too", "", "loss"),
        Way("`deepspeed` launcher", "", "", ""),
    ],
    "Loops, search and loggers": [
        Way("a loop of plain torch", "", _LOOPS),
        Way("a loop with Accelerate", "", _LOOPS),
        Way("Lightning", "", _LOOPS),
        Way("`model_init`"),
        Way("Optuna", "", _SEARCH),
        Way("Ray Tune", "", _SEARCH),
        Way("TensorBoard", "", _LOGGERS),
        Way("W&B", "", _LOGGERS),
        Way("MLflow", "", _LOGGERS),
        Way("Liger", "its own loss", "", ""),
    ],
    "Settings of Trainer": [
        Way("gradient accumulation", "", _USUAL),
        Way("gradient checkpointing", "", "gradient checkpointing"),
        Way("bf16 autocast", "", _BF16),
        Way("bf16 parameters", "AdamW gives the trajectory of fp32 parameters", _BF16),
        Way('`offload="states"`', "[what fits](memory.md); to the bit", _OFFLOAD, ""),
        Way('`offload="gradients"`', "to the bit", _OFFLOAD, ""),
        Way('`offload="overlap"`', "to the bit", _OFFLOAD, ""),
        Way("`release_gradients=True`", "without clipping and accumulation; to the bit", "", ""),
        Way("fp16 autocast with a GradScaler", "`fp16=True` over fp32 parameters", "", ""),
        Way("fp16 parameters", "train them in fp32, with autocast", "fp16 parameters", ""),
        Way("`torch_compile`", "a graph break at the head and at attention", "`torch.compile`"),
        Way("label smoothing", "", _USUAL),
        Way("`compute_loss_func`", "", _USUAL),
        Way("NEFTune", "", _USUAL),
        Way("group by length", "", _USUAL),
        Way("clipping: none, tight", "", _USUAL),
        Way("schedules of the learning rate", "", _USUAL),
        Way("evaluation and metrics", "", _USUAL),
        Way("early stopping, the best model", "", _USUAL),
        Way("workers of the loader", "", _USUAL),
        Way("`auto_find_batch_size`", "", _USUAL),
        Way("counted tokens, emptied caches", "", _USUAL),
        Way("`optim` that is no AdamW", "", "", ""),
        Way(
            "a model changed after `adamw(model)`",
            "resized embeddings, `set_adapter`: make it later, or use `adamw_spec`, `plug`",
            "",
            "",
        ),
        Way(
            "resuming", "to the bit, where stock's is; drawn masks are others, as stock's", _RESUME
        ),
        Way("killed in the middle, resumed", "packs too", _RESUME, "loss optimizer packing"),
        Way("from stock to fastft, and back", "a checkpoint of either", _RESUME),
    ],
}
ROWS = {way.name: way for ways in SECTIONS.values() for way in ways}

Claim = tuple[str, str, str]  # row, column, word


def claims(item: pytest.Item) -> list[Claim]:
    """What a test proves, by its marks; pytest.UsageError for a mark that names no row, no column
    or a word that is none."""
    return [claim for mark in item.iter_markers("way") for claim in _claims_of(mark, item.nodeid)]


def _claims_of(mark: pytest.Mark, test: str) -> list[Claim]:
    if len(mark.args) != 1 or mark.args[0] not in ROWS:
        near = difflib.get_close_matches(str(mark.args[0]) if mark.args else "", ROWS, 3, 0.3)
        raise _refused(test, f"way{mark.args} is no row of tests/support/ways.py", near or ROWS)
    if not mark.kwargs or not set(mark.kwargs) <= set(COLUMNS):
        raise _refused(test, f"columns {list(mark.kwargs)} of way{mark.args}", COLUMNS)
    for column, word in mark.kwargs.items():
        words = [each for each in WORDS if each != "no vocabulary" or column == "loss"]
        if word not in words:
            raise _refused(test, f"{column}={word!r} of way{mark.args}", words)
    return [(mark.args[0], column, word) for column, word in mark.kwargs.items()]


def _refused(test: str, what: str, choices) -> pytest.UsageError:
    return pytest.UsageError(f"{test}: {what}; there is {', '.join(map(repr, choices))}")


def disagreements(tests: dict[str, list[Claim]]) -> list[str]:
    """A sentence for each cell of which two tests say different words."""
    found: dict[tuple[str, str], tuple[str, str]] = {}
    sentences: dict[tuple[str, str], str] = {}
    for test, claimed in tests.items():
        for row, column, word in claimed:
            said, other = found.setdefault((row, column), (word, test))
            if said != word:
                sentences.setdefault(
                    (row, column),
                    f"{column} of way {row!r} is {word!r} by {test}, and {said!r} by {other}: one "
                    "of the two belongs to a row of its own in tests/support/ways.py",
                )
    return [*sentences.values()]
