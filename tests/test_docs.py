"""README and docs tell the truth: their Python runs, their commands exist, each limit has a
test."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import documentation
from support.trainers import tiny_llama
from torch import nn

import fastft

BLOCKS = documentation.python_blocks()
COMMANDS = sorted(documentation.commands())


def examples(count=12):
    return [{"input_ids": list(range(3, 8 + number % 7))} for number in range(count)]


def model_for(block):
    """A tiny model of the kind that a block is about."""
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    if "sequence_classification" in block:
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(**sizes, num_attention_heads=4, attn_implementation="fastft")
        )
    if "seq2seq" in block:
        return transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, decoder_start_token_id=0
            )
        )
    return tiny_llama(attn_implementation="fastft")


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "word": 3}, "[UNK]"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def world(block, folder):
    """What the blocks take for granted: the names that a reader has from his own script."""
    import transformers

    fastft.register_attention()
    model = model_for(block)
    model.save_pretrained(folder / "model")
    hidden = torch.randn(14, 32, requires_grad=True)
    head, labels = nn.Linear(32, 97), torch.randint(97, (14,))
    ours = fastft.PackingCollator()
    return {
        "fastft": fastft,
        "torch": torch,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "DataLoader": torch.utils.data.DataLoader,
        "name": str(folder / "model"),
        "model": model,
        "args": transformers.TrainingArguments("out"),
        "dataset": examples(),
        "data": [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8,
        "packs": fastft.pack(examples(), max_tokens=32),
        "loader": torch.utils.data.DataLoader(
            fastft.pack(examples(), max_tokens=32), collate_fn=ours
        ),
        "accelerator": SimpleNamespace(
            backward=torch.Tensor.backward, prepare=lambda *given: given
        ),
        "tokenizer": tokenizer(),
        "params": list(model.parameters()),
        "hidden": hidden,
        "head": head,
        "labels": labels,
        "logits": head(hidden),
        "num_items_in_batch": torch.tensor(14),
        "policy_loss": lambda token, old_log_probs, advantages: (
            -(token.log_probs - old_log_probs) * advantages
        ),
        "old_log_probs": torch.randn(14),
        "advantages": torch.randn(14),
    }


@pytest.fixture
def quiet_arguments(monkeypatch):
    """`TrainingArguments` of one step that leaves nothing behind, whatever else a block asks
    for."""
    from transformers import TrainingArguments

    short = {
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_steps": 1,
    }
    stock = TrainingArguments.__init__

    def quiet(self, *args, **kwargs):
        stock(self, *args, **{**kwargs, **short})

    monkeypatch.setattr(TrainingArguments, "__init__", quiet)


@pytest.mark.parametrize("place", BLOCKS)
def test_the_block_of_python_runs(place, tmp_path, monkeypatch, quiet_arguments):
    block = BLOCKS[place]
    if "torch.cuda" in block and not torch.cuda.is_available():
        pytest.skip("the block needs a GPU")
    if "optuna" in block:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    names = world(block, tmp_path)
    exec(compile(block, place, "exec"), names)
    if "trainer" in names and "trainer.train()" not in block:
        names["trainer"].train()


CONFIGURATIONS = {
    f"{page.name} {number}": found
    for page in documentation.PAGES
    for number, found in enumerate(documentation.configurations(page))
}


@pytest.mark.parametrize("place", CONFIGURATIONS)
def test_a_configuration_has_no_key_that_its_engine_does_not_know(place, tmp_path):
    kind, text = CONFIGURATIONS[place]
    if kind == "json":
        given = json.loads(text)
        if importlib.util.find_spec("deepspeed"):
            read = importlib.import_module("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
            assert read(**given["zero_optimization"]).stage == given["zero_optimization"]["stage"]
    else:
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        (tmp_path / "config.yaml").write_text(text)
        config = load_config_from_file(str(tmp_path / "config.yaml"))
        options = launch_command_parser()._option_string_actions
        assert [name for name in config.fsdp_config if f"--{name}" not in options] == []
        assert config.fsdp_config


def test_every_page_has_a_block_that_runs():
    pages = {place.partition(":")[0] for place in BLOCKS}
    assert {page.name for page in documentation.PAGES if "```python" in page.read_text()} <= pages


def _marked(command):
    return pytest.param(command, marks=[pytest.mark.slow] if "benchmarks/" in command else [])


@pytest.mark.parametrize("command", [_marked(command) for command in COMMANDS])
def test_the_command_exists(command):
    """A target of make is known to it, a script takes the options, a selection of benchmarks is not
    empty."""
    words = shlex.split(command)
    python = {
        "python": [sys.executable],
        "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
    }
    if words[0] == "make":
        line = ["make", "-n", *words[1:]]
    elif words[0] == "pytest":
        line = [*python["pytest"], *words[1:], "--collect-only", "-q"]
    elif words[0] == "pip":
        pytest.skip("what pip installs is the build's test")
    elif words[1:3] == ["-m", "fastft"] and len(words) > 3:
        line = [*python["python"], *words[1:4], "--help"]  # the script is the reader's
    else:
        line = [*python["python"], *words[1:], *([] if words[1] == "-m" else ["--help"])]
    # a worker of pytest's own would switch benchmarks off
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    done = subprocess.run(
        line, cwd=documentation.ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    ours = words[: words.index("train.py")] if "train.py" in words else words  # before the script
    for option in (word for word in ours if word.startswith("--") and words[0] == "python"):
        assert option in done.stdout


# how a limit begins, after the name of its page: the tests, or the benchmarks of a figure, which
# hold it
LIMITS = {
    "estimate.md: A model whose shapes depend": [
        "test_estimate.py::test_a_shape_that_depends_on_numbers_is_refused"
    ],
    "estimate.md: On a CPU the fused loss": [
        "test_estimate.py::test_label_smoothing_of_padded_rows_is_estimated_too_high"
    ],
    "estimate.md: Packing of classifiers": [
        "test_estimate.py::test_a_piece_that_does_not_fit_the_model_has_a_sentence"
    ],
    "works-with.md: **Not yet run on a GPU.**": [
        "test_triton_on_amd.py::test_cross_entropy",
        "test_triton_binaries.py::test_no_spills",
        "test_cross_entropy_ptx.py::test_every_option",
        "test_adamw_ptx.py::test_every_mode",
        "test_boundaries.py::test_gpu_kernels_as_ptx_count_right",
    ],
    "works-with.md: Packing: ": [
        "test_packing_matrix.py::test_no_architecture_leaks_silently",
        "test_packing_matrix.py::test_a_model_is_exact_or_refused",
        "test_packing_callback.py::test_a_model_that_cannot_be_asked_is_trained_with_a_warning",
        "test_image_packing.py::test_no_class_for_images_is_wrong_silently",
        "test_image_trainer.py::test_images_of_an_iterable_dataset_are_refused_before_training",
        "test_image_text.py::test_no_example_is_cut_through_its_images",
    ],
    "works-with.md: Inside a model, softcap": [
        "test_lazy_logits.py::test_which_losses_reach_the_kernel",
        "test_lazy_logits.py::test_only_a_scale_and_a_softcap_go_to_the_kernel",
    ],
    "works-with.md: AdamW refuses fp16": [
        "test_adamw.py::test_bad_dtypes",
        "test_adamw_input.py::test_parameters_which_cannot_be_trained",
        "test_moment_codes.py::test_amsgrad_is_refused",
        "test_adamw_update.py::test_pieces_of_a_tensor_get_the_bits_of_the_whole",
        "test_device_counts.py::test_what_a_graph_has_captured",
        "test_engines.py::test_trains_and_resumes_as_stock_does_or_says_why_not",
    ],
    "works-with.md: The mean over no counted row": [
        "test_cross_entropy.py::test_no_row_counts",
        "test_linear_cross_entropy.py::test_no_row_counts",
        "test_loss_goals.py::test_fp32_loss_sum",
    ],
    "works-with.md: Heads are fused where": [
        "test_engines.py::test_trains_and_resumes_as_stock_does_or_says_why_not",
        "test_peft.py::test_adapters_are_trained_as_stock",
        "test_adapters.py::test_a_method_on_the_head_has_the_gradients_of_stock_and_no_logits",
        "test_quantised_bases.py::test_a_head_of_4_bits_is_fused",
        "test_quantised_bases.py::test_a_head_of_8_bits_stays_stock_and_the_report_says_so",
        "test_peft.py::test_lora_on_the_head_of_a_bf16_model_is_fused_and_no_worse_than_stock",
        "test_output_head.py::test_a_head_whose_weight_is_computed_trains_as_stock",
        "test_distributed_loss.py::test_a_loss_inside_forward_is_fused_and_stock",
        "test_distributed_loss.py::test_what_a_sharding_library_would_not_notice_stays_stock_and_says_so",
        "test_fused_loss.py::test_data_parallel_is_left_alone",
    ],
    "works-with.md: A tensor-parallel head": [
        "test_tensor_parallel_head.py::test_a_head_spread_by_a_plan",
    ],
    "works-with.md: Where the rows of a batch": [
        "test_cut_rows.py::test_packs_are_refused_before_training",
    ],
    "works-with.md: Evaluation is without logits": [
        "test_evaluation.py::test_evaluation_outside_train_is_stock",
        "test_evaluation.py::test_a_sharded_head_is_evaluated_as_stock",
        "test_plug.py::test_evaluate_and_predict_alone_are_those_of_stock_and_hold_no_logits",
    ],
    "works-with.md: A hook on logits": [
        "test_lazy_logits.py::test_a_hook_that_would_never_run_raises",
        "test_lazy_logits.py::test_who_watches_before_the_loss_sees_the_gradient",
    ],
    "adamw.md: **Not yet run on a GPU**": [
        "test_adamw_ptx.py::test_every_mode",
        "test_triton_binaries.py::test_adamw_has_no_spills",
    ],
    "adamw.md: fp16, complex": [
        "test_adamw.py::test_bad_dtypes",
        "test_adamw.py::test_bad_options",
        "test_adamw_input.py::test_parameters_which_cannot_be_trained",
        "test_moment_codes.py::test_amsgrad_is_refused",
    ],
    "adamw.md: On a CPU with AVX2": [
        "benchmarks/test_adamw.py::test_adamw_bf16_modes",
        "benchmarks/test_adamw.py::test_adamw_8bit",
    ],
    "adamw.md: On a CPU a step over many small": [
        "benchmarks/test_adamw.py::test_adamw",
    ],
    "adamw.md: On a GPU, without `capturable`": [
        "test_gpu.py::test_an_adamw_step_does_not_wait",
        "test_gpu.py::test_adamw_with_a_grad_scaler",
    ],
    "adamw.md: Of parameters on several devices": [
        "test_adamw_plan.py::test_on_several_devices_nothing_is_updated_twice",
    ],
    'adamw.md: `state[p]["step"].data': [
        "test_adamw_plan.py::test_a_step_count_set_by_hand_counts",
    ],
    "adamw.md: `max_grad_norm` under": [
        "test_optimizer_check.py::test_plain_adamw_survives_offload_and_an_optimizer_of_deepspeeds_own_does_not_pass",
        "test_engines.py::test_trains_and_resumes_as_stock_does_or_says_why_not",
    ],
    "adamw.md: Under DeepSpeed and FSDP1": [
        "test_optimizer_check.py::test_flat_parameters_are_not_looked_for_in_the_model",
        "test_optimizer_check.py::test_plain_adamw_survives_offload_and_an_optimizer_of_deepspeeds_own_does_not_pass",
        "test_engines.py::test_trains_and_resumes_as_stock_does_or_says_why_not",
    ],
    "adamw.md: With `offload` steps": [
        "test_states.py::test_a_group_that_becomes_capturable_later_is_refused",
    ],
    "adamw.md: Both moments in 4 bits": [
        "test_adamw.py::test_bad_options",
    ],
    "loss.md: Not yet run on a GPU": [
        "test_cross_entropy_ptx.py::test_every_option",
        "test_triton_binaries.py::test_no_spills",
    ],
    "loss.md: Target probabilities": [
        "test_cross_entropy.py::test_target_probabilities",
        "test_lazy_logits.py::test_which_losses_reach_the_kernel",
    ],
    "loss.md: `torch.compile` takes": [
        "test_linear_cross_entropy.py::test_compiles_to_one_graph",
        "test_trainer_interplay.py::test_compiled",
    ],
    "loss.md: A head that computes its weight": [
        "test_output_head.py::test_a_head_whose_weight_is_computed_trains_as_stock",
    ],
    "loss.md: The head is what": [
        "test_output_head.py::test_the_head_alone_of_a_language_model_as_wide_as_its_vocabulary",
        "test_output_head.py::test_the_head_of_a_module_of_ones_own",
    ],
    "loss.md: Logits of an evaluation read": [
        "test_evaluation.py::test_weights_swapped_in_every_prediction_step",
    ],
    "loss.md: `linear_token_loss` gives": [
        "test_linear_log_probs.py::test_token_losses",
        "test_loss_goals.py::test_accumulating_into_weight_grad_is_refused_where_it_would_go_unseen",
    ],
    "loss.md: A second derivative": [
        "test_lazy_logits.py::test_second_derivatives_are_refused",
    ],
    "loss.md: A target out of range": [
        "test_cross_entropy.py::test_bad_input",
        "test_linear_cross_entropy.py::test_bad_input",
    ],
    "loss.md: Logits that are read": [
        "test_lazy_logits.py::test_reading_after_the_weight_changed_raises",
        "test_lazy_logits.py::test_a_hook_that_would_never_run_raises",
        "test_lazy_logits.py::test_who_watches_before_the_loss_sees_the_gradient",
    ],
    "loss.md: An explicit `impl=`": [
        "test_ops.py::test_an_engine_that_does_not_suit_never_becomes_another",
    ],
    "packing.md: accelerate's `dispatch_batches=True`": [
        "test_packing_callback.py::test_dispatched_batches_are_refused",
    ],
    "packing.md: Packs in an evaluation": [
        "test_distributed_evaluation.py::test_on_two_processes",
        "test_balance.py::test_regression_labels_cannot_be_ignored",
    ],
    "packing.md: An empty dataset": [
        "test_packed.py::test_bad_datasets",
    ],
    "collator.md: `supervised_only` with": [
        "test_supervised_only.py::test_bad_arguments_are_named",
    ],
    "collator.md: `supervised_only=model` where": [
        "test_supervised_only.py::test_a_model_without_chosen_logits_is_refused",
    ],
    "collator.md: Labels that do not suit": [
        "test_collator.py::test_bad_labels",
        "test_collator.py::test_columns_named_as_the_collators_own_are_kept_or_refused",
    ],
    "collator.md: A list that is to say": ["test_columns.py::test_bad_examples"],
    "collator.md: A `FlatBatch`": [
        "test_packing_callback.py::test_dispatched_batches_are_refused",
        "test_packing_callback.py::test_data_parallel_is_refused",
    ],
    "packed-attention.md: `NotImplementedError`": [
        "test_attention.py::test_bad_calls",
        "test_attention.py::test_chunks_and_padding_are_refused",
    ],
    "packed-attention.md: `ValueError`": [
        "test_attention.py::test_bad_calls",
    ],
    "packing-probe.md: A model that mixes": [
        "test_packing_callback.py::test_training_on_contaminated_batches_is_refused",
        "test_packing_callback.py::test_or_only_warned_about",
    ],
    "packing-probe.md: A model that cannot": [
        "test_packing_callback.py::test_a_model_that_cannot_be_asked_is_not_trained",
    ],
    "packing-probe.md: DataParallel and": [
        "test_packing_callback.py::test_dispatched_batches_are_refused",
        "test_packing_callback.py::test_data_parallel_is_refused",
    ],
    "packing.md: `max_tokens` below": [
        "test_plan.py::test_bad_capacity",
        "test_plan.py::test_kernel_refuses_what_does_not_fit",
    ],
    "packing.md: An example without tokens": [
        "test_packed.py::test_bad_datasets",
        "test_streaming.py::test_bad_input",
    ],
    "packing.md: Groups of `balance`": [
        "test_balance.py::test_ranks_have_equal_tokens_and_squares",
    ],
    "packing.md: `Seq2SeqTrainer` keeps": [
        "test_distributed_evaluation.py::test_on_two_processes",
    ],
    "packing.md: With a random sampler": [
        "test_packing_trainer.py::test_resuming_gives_the_same_batches",
    ],
    "collator.md: A `seed` of masks": [
        "test_masking.py::test_workers_draw_masks_of_their_own",
        "test_masking.py::test_one_that_is_made_anew_draws_from_the_beginning_as_transformers",
    ],
    "collator.md: Task `speech_seq2seq`": [
        "test_speech_batches.py::test_options_that_are_refused",
    ],
    "collator.md: Whole-word masking": [
        "test_masking.py::test_masks_are_those_of_transformers",
    ],
    "collator.md: A batch has at most": [
        "test_columns.py::test_padding_past_int32_is_refused",
    ],
    "packed-attention.md: Attention code that does not": [
        "test_packing_matrix.py::test_a_model_is_exact_or_refused",
    ],
    "packed-attention.md: `torch.compile` breaks": [
        "test_limits_of_attention.py::test_a_compiled_model_breaks_its_graph_and_is_right",
    ],
    "packed-attention.md: Without `packed_attention`": [
        "test_limits_of_attention.py::test_a_model_that_hands_on_no_positions_without_the_context",
    ],
    "packed-attention.md: Many short segments": [
        "benchmarks/test_attention.py::test_packed_attention",
    ],
    "packed-attention.md: Second derivatives": [
        "test_limits_of_attention.py::test_a_second_derivative_raises",
    ],
    "packing-probe.md: The probe sees": [
        "test_check_packing.py::test_a_leak_that_begins_behind_a_limit",
        "test_packing_matrix.py::test_a_model_is_exact_or_refused",
        "test_probe_rows.py::test_how_long_the_long_row_is",
    ],
    "packing-probe.md: A leak below a floor": [
        "test_check_packing.py::test_small_leaks_and_noise",
    ],
    "packing-probe.md: Of sharded models": [
        "test_twin.py::test_the_twin_of_a_published_size_gets_the_verdict_of_a_small_model",
        "test_twin.py::test_a_class_that_takes_more_than_a_configuration_has_none",
        "test_twin.py::test_hooks_that_a_twin_has_not_are_spoken_of",
    ],
    "packing-probe.md: Top-k sparse attention": [
        "test_packing_matrix.py::test_a_model_is_exact_or_refused",
    ],
    "packing-probe.md: Flash attention": [
        "test_segment_attention.py::test_flash_attn_arguments",
    ],
}


@pytest.mark.parametrize("limit", documentation.limits().values(), ids=documentation.limits())
def test_the_limit_has_a_test(limit, request):
    name = request.node.callspec.id
    named = [
        tests
        for begin, tests in LIMITS.items()
        if f"{name.partition(':')[0]}: {limit}".startswith(begin)
    ]
    assert len(named) == 1, "every limit names the tests that hold it, in LIMITS"
    assert set(named[0]) <= documentation.tests()


def test_no_limit_is_listed_that_no_page_has():
    pages = [f"{name.partition(':')[0]}: {text}" for name, text in documentation.limits().items()]
    assert not [begin for begin in LIMITS if not any(text.startswith(begin) for text in pages)]


def map_of(folder):
    """The sections of CONTRIBUTING's map that are about a folder."""
    page = (documentation.ROOT / "CONTRIBUTING.md").read_text()
    return [text for text in page.split("\n### ") if f"`{folder}/`" in text.partition("\n")[0]]


ROOMS = sorted({path.parent for path in (documentation.ROOT / "fastft").rglob("*.py")})


@pytest.mark.parametrize("folder", ROOMS, ids=lambda path: path.name)
def test_the_map_of_the_house_has_every_room(folder):
    sections = map_of(folder.relative_to(documentation.ROOT))
    told = {name for text in sections for name in re.findall(r"`(\w+\.py)`", text)}
    hidden = {"__init__.py"}
    assert told | hidden == {path.name for path in folder.glob("*.py")} | hidden


def test_the_map_names_no_file_that_is_not_there():
    page = (documentation.ROOT / "CONTRIBUTING.md").read_text()
    spans = {span for span in documentation.spans(page) if re.fullmatch(r"\w+/[\w/.*]*", span)}
    gone = [span for span in spans if not list(documentation.ROOT.glob(span.rstrip("/")))]
    assert gone in ([], ["build/site"])  # which make docs makes


@pytest.mark.parametrize("folder", ["csrc", "tests/support", "benchmarks"])
def test_the_map_has_every_file_beside_the_rooms(folder):
    gpu = documentation.ROOT / "docs" / "gpu-code-without-a-gpu.md"
    sections = [*map_of(folder.partition("/")[0]), gpu.read_text()]
    named = {Path(span).name for text in sections for span in documentation.spans(text)}
    known = ("__init__.py", "conftest.py", "test_*.py")
    files = [
        path
        for path in (documentation.ROOT / folder).rglob("*.*")
        if path.suffix[1:] in ("py", "cpp", "cu", "cuh", "h")
    ]
    assert files
    assert [path.name for path in files if not any(map(path.match, (*known, *named)))] == []


@pytest.mark.parametrize("page", documentation.PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    broken = []
    for target in (target for source, target in documentation.links() if source == page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in documentation.anchors(there)):
            broken.append(target)
    assert broken == []


def test_every_page_stands_in_the_navigation():
    listed = re.findall(
        r"^ *- .*: (\S+\.md)$", (documentation.ROOT / "mkdocs.yml").read_text(), re.M
    )
    pages = {str(page.relative_to(documentation.ROOT)) for page in documentation.PAGES}
    assert pages <= set(listed)
    assert [name for name in listed if not (documentation.ROOT / name).exists()] == []


def test_the_reference_has_every_public_name():
    page = (documentation.ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: fastft\.(\w+)$", page, re.M)) == sorted(fastft.__all__)


def test_every_environment_variable_stands_in_the_table():
    page = (documentation.ROOT / "docs" / "environment.md").read_text()
    told = {name for name in documentation.spans(page) if re.fullmatch(r"[A-Z_]+", name)}
    read = documentation.variables_read()
    assert read, "nothing was found"
    # code may put the end of a name together, FASTFT_BUILD_ and the library
    assert [name for name in read if not any(known.startswith(name) for known in told)] == []
    ours = [name for name in told if name.startswith("FASTFT_")]
    assert [name for name in ours if not any(name.startswith(known) for known in read)] == []


def test_what_the_design_names_exists():
    """`path`, and `path::name` for a function, class, method or kernel; the drawing names paths."""
    root = documentation.ROOT
    page = (root / "docs" / "design.md").read_text()
    drawing = (root / "docs" / "design.svg").read_text()
    in_drawing = re.findall(r"(?:fastft|csrc)/[\w/]+\.\w+(?:::\w+)?", drawing)
    named = [span for span in documentation.spans(page) if re.match(r"[\w.]+/|[\w/]+\.\w+::", span)]
    assert len(named) > 20 and in_drawing
    wrong = []
    for span in (*named, *in_drawing):
        path, _, name = span.partition("::")
        files = sorted(root.glob(path.replace("<op>", "*")))
        if not files or (name and not documentation.has_name(files[0], name)):
            wrong.append(span)
    assert wrong == []
    sources = "".join(
        (root / span.partition("::")[0]).read_text()
        for span in named
        if ".py" in span and "<" not in span
    )
    names = [span for span in documentation.spans(page) if re.fullmatch(r"[a-z_]\w*\(\)", span)]
    assert [name for name in names if name[:-2] not in sources] == []
