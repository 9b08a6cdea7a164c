"""`python -m fastft estimate`: what it says is what a real training holds; what cannot be said is a
sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.trainers import llama_config

import fastft
from fastft.commands import estimate
from fastft.integrations.estimated_training import Memory, Training, measure
from fastft.live_memory import ROLES, LiveMemory, Peak
from fastft.loss import head_gemms
from fastft.optim.adamw import ROUNDINGS
from fastft.optim.offload import gradients, pieces, tiers
from fastft.unallocated import Unallocated, UnknownNumbers

ALL = frozenset(("loss", "optimizer", "packing"))
STOCK = frozenset[str]()
HALF = {"rows": 3, "tokens": 48, "padding": 0.4}
SIZES = {"vocab_size": 503, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama(vocab_size=503, **changes):
    config = llama_config(vocab_size, **changes)
    config.architectures = ["LlamaForCausalLM"]
    return config


def t5():
    sizes = {"vocab_size": 503, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1}
    config = transformers.T5Config(**sizes, num_heads=4, decoder_start_token_id=0)
    config.architectures = ["T5ForConditionalGeneration"]
    return config


def bert(architecture):
    config = transformers.BertConfig(**SIZES, num_hidden_layers=1)
    config.architectures = [architecture]
    return config


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a configuration and nothing else."""
    llama().save_pretrained(tmp_path)
    return tmp_path


def run(capsys, *arguments):
    """The exit code, and what was printed."""
    try:
        code = estimate.main(list(map(str, arguments)))
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


class TestAgainstARealTraining:
    @pytest.mark.parametrize(
        ("training", "pieces"),
        [
            pytest.param(Training(llama(), **HALF), STOCK, id="stock, padded, fp32"),
            pytest.param(
                Training(llama(), **HALF, dtype="bf16", moments="8bit", checkpointing=True),
                ALL,
                id="all pieces, bf16, 8-bit moments, checkpointing",
            ),
            pytest.param(
                Training(llama(), **HALF, autocast=True, accumulation=2),
                STOCK,
                id="autocast, micro",
            ),
            pytest.param(Training(llama(), **HALF, lora=4), frozenset(("loss",)), id="LoRA, loss"),
            pytest.param(Training(t5(), **HALF), ALL, id="seq2seq, all pieces"),
            pytest.param(Training(bert("BertForMaskedLM"), **HALF), ALL, id="masked, all pieces"),
            pytest.param(
                Training(bert("BertForSequenceClassification"), **HALF),
                frozenset(("optimizer",)),
                id="classifier, AdamW",
            ),
        ],
    )
    def test_estimates_are_what_is_counted(self, training, pieces):
        if training.lora:
            pytest.importorskip("peft")
        if "packing" in pieces:
            measure(training, pieces, LiveMemory())  # the probe's passes are the first training's
        counted = measure(training, pieces, LiveMemory())
        estimated = measure(training, pieces, Unallocated())
        for real, said in (
            (counted.training, estimated.training),
            (counted.evaluation, estimated.evaluation),
        ):
            assert real.phase == said.phase
            assert said.bytes == pytest.approx(real.bytes, rel=0.02)
            for role, bytes in real.parts.items():
                assert said.parts[role] == pytest.approx(bytes, rel=0.02, abs=4096), role

    def test_weights_and_optimizer_are_those_of_the_formula(self):
        training = Training(llama(), tokens=16, moments="bf16")
        parts = measure(training, frozenset(("optimizer",)), Unallocated()).training.parts
        numbers = sum(p.numel() for p in transformers.LlamaForCausalLM(llama()).parameters())
        assert parts["weights"] == pytest.approx(4 * numbers, rel=0.01)
        assert parts["optimizer"] == pytest.approx(4 * numbers, rel=0.01)

    def test_the_fused_loss_holds_no_logits_of_all_tokens(self):
        training = Training(llama(vocab_size=32_003), tokens=600)
        stock, fused = (
            measure(training, pieces, Unallocated()).training.logits
            for pieces in (STOCK, frozenset(("loss",)))
        )
        assert stock >= 2 * 600 * 32_003 * 4
        assert fused < stock / 3


class TestOffload:
    def measured(self, offload, moments="fp32", **changes):
        config = llama(vocab_size=32_003, num_hidden_layers=3)
        training = Training(config, dtype="bf16", tokens=16, moments=moments, checkpointing=True)
        training = replace(training, offload=offload, **changes)
        return measure(training, ALL, Unallocated(device="cuda"))

    def test_what_is_on_the_host_is_no_memory_of_the_device(self, monkeypatch):
        monkeypatch.setattr(pieces, "BUFFER", 9001)
        monkeypatch.setattr(gradients, "IN_FLIGHT", 5000)
        model = transformers.AutoModelForCausalLM.from_config(
            llama(vocab_size=32_003, num_hidden_layers=3), dtype=torch.bfloat16
        )
        groups = fastft.adamw(model)[0].param_groups
        for offload in tiers.TIERS[1:]:
            found, size = self.measured(offload), tiers.bytes_of(groups, "exact", offload)
            assert found.host == pytest.approx(size.host, rel=0.01)
            parts = found.training.parts
            assert parts["weights"] == pytest.approx(size.weights, rel=0.01)
            assert parts["gradients"] <= size.gradients
            assert parts["optimizer"] == size.staging

    def test_each_tier_takes_less_than_the_one_before(self, monkeypatch):
        monkeypatch.setattr(pieces, "BUFFER", 9001)
        monkeypatch.setattr(gradients, "IN_FLIGHT", 5000)
        none, states, held = (
            self.measured(offload).training.bytes for offload in (None, "states", "gradients")
        )
        released = self.measured(None, release_gradients=True).training
        assert none > released.bytes > states > held
        assert released.host == 0

    def test_gradients_of_micro_steps_go_to_the_host_too(self, monkeypatch):
        monkeypatch.setattr(gradients, "STAGE", 16384)
        one, three = (self.measured("gradients", accumulation=count) for count in (1, 3))
        assert one.host == three.host
        more = three.training.parts["gradients"] - one.training.parts["gradients"]
        assert 0 < more <= one.training.parts["weights"]  # those of two micro-steps are in flight
        more = three.training.parts["optimizer"] - one.training.parts["optimizer"]
        assert more == 2 * 16384 * 2


def test_a_gpu_is_the_same_whatever_the_processor_emulates(monkeypatch):
    training, found = Training(llama(vocab_size=32_003), dtype="bf16", tokens=16), []
    for emulated in (True, False):
        monkeypatch.setattr(
            head_gemms,
            "_is_emulated",
            lambda dtype, device, is_so=emulated: is_so and device == "cpu",
        )
        found.append(measure(training, ALL, Unallocated(device="cuda")).training)
    assert found[0] == found[1]


def test_attention_with_dropout_holds_no_scores_on_a_gpu():
    config = bert("BertForMaskedLM")
    training = Training(config, tokens=400)
    gpu, cpu = (measure(training, STOCK, Unallocated(device=name)) for name in ("cuda", "cpu"))
    config.attention_probs_dropout_prob = 0.0
    plain = measure(training, STOCK, Unallocated(device="cuda"))
    assert gpu.training.bytes == plain.training.bytes
    assert cpu.training.bytes > gpu.training.bytes + 4 * 400**2 * 4  # the scores of four heads


class TestNothingIsAllocated:
    def test_a_layer_of_70_billion_takes_no_memory(self):
        sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
        training = Training(llama(**sizes, vocab_size=128_256), tokens=8192, dtype="bf16")
        before = _held()
        memory = measure(replace(training, checkpointing=True), STOCK, Unallocated(device="cuda"))
        assert memory.training.bytes > 20 << 30
        assert _held() - before < 400 << 20

    def test_integers_keep_their_numbers_and_floats_have_none(self):
        with Unallocated():
            ids = torch.arange(6).view(2, 3)
            weight = torch.randn(10, 4)
            rows = weight[ids]
            assert ids.sum() == 15
            assert rows.shape == (2, 3, 4)
            assert rows.argmax(-1)[0, 0].item() == 1  # nobody knows it
        assert type(rows) is torch.Tensor and rows.device.type == "cpu"


class TestLiveMemory:
    def test_views_are_free_and_freed_tensors_leave(self):
        with LiveMemory() as counter:
            one = torch.zeros(256)
            view = one.view(16, 16)
            del one
            two = torch.zeros(512)
            del view
            three = torch.zeros(64)
        peak = counter.peak()
        assert peak.bytes == 4 * (256 + 512)
        assert counter.peak(counter.now - 1).bytes == 4 * (512 + 64)
        del two, three

    def test_the_peak_is_split_by_what_it_is_for(self):
        weight = torch.ones(8, 8, requires_grad=True)
        with LiveMemory(classes=8) as counter:
            counter.tag("weights", [weight])
            counter.phase = "forward"
            loss = (torch.ones(4, 8) @ weight).exp().sum()
            loss.backward()
            counter.tag("gradients", [weight.grad])
        peak = counter.peak()
        assert peak.parts["weights"] == peak.parts["gradients"] == 4 * 64
        assert peak.parts["logits"] >= 4 * 32
        assert peak.phase == "backward"
        assert sum(peak.parts.values()) == peak.bytes


class TestTheCommand:
    def test_it_prints_each_part_and_writes_bytes(self, folder, capsys):
        out, shape = folder / "figures.json", ("--max-tokens", 32, "--rows", 2, "--padding", 0.3)
        code, said = run(capsys, folder, *shape, "--memory", "2GB", "--json", out)
        assert code == 0, said.err
        for word in (*estimate.COLUMNS, *ROLES, "30% padding", "it fits, stock and with fastft"):
            assert word in said.out
        found = json.loads(out.read_text())
        assert found["columns"].keys() == estimate.COLUMNS.keys()
        assert found["columns"]["stock"]["training"]["parts"]["weights"] > 0
        assert (found["memory"], found["overhead"]) == (2 << 30, 1 << 30)

    @pytest.mark.parametrize(
        ("limit", "sentence"),
        [
            (100, "it fits, stock and with fastft"),
            (99, "stock does not fit; fastft's AdamW makes it fit"),
            (70, "stock does not fit; all pieces of fastft make it fit"),
            (50, "it does not fit; with fastft, --checkpointing it does"),
            (
                20,
                "--checkpointing, --rows 2 --accumulation 2, --rows 1 --accumulation 4 it does",
            ),
            (0, "not even with fastft, --checkpointing"),
        ],
    )
    def test_it_says_the_first_change_that_makes_it_fit(self, limit, sentence):
        def memory(bytes):
            return Memory(Peak(bytes, {}, "backward", 0), Peak(0, {}, "evaluation", 0))

        def measured(training, pieces):
            assert pieces == ALL
            return memory(10 + 10 * training.rows if training.checkpointing else 60)

        peaks = {"stock": 100, "+loss": 100, "+AdamW": 90, "+packing": 80, "all": 60}
        results = {column: memory(bytes) for column, bytes in peaks.items()}
        said, fits = estimate._advice(Training(llama(), rows=4), results, limit, measured)
        assert sentence in said
        assert fits == {column: bytes <= limit for column, bytes in peaks.items()}

    @pytest.mark.parametrize(
        ("limit", "sentence"),
        [
            (80, "rounds to bf16; with --offload states it fits: 0.0000 GiB"),
            (76, "rounds to bf16; with --offload gradients it fits: 0.0000 GiB"),
            (75, "rounds to bf16; with --moments bf16 it fits: 0.0000 GiB"),
            (74, "stock fits; +AdamW and all do not, as fastft's AdamW keeps in fp32 what stock"),
            (74, "rounds to bf16; with --moments 8bit it fits"),
            (72, "rounds to bf16; with --moments 4bit it fits"),
            (71, "what stock rounds to bf16"),
        ],
    )
    def test_stock_fits_and_exact_adamw_does_not(self, limit, sentence):
        def memory(bytes):
            return Memory(Peak(bytes, {}, "step", 0), Peak(0, {}, "evaluation", 0))

        def measured(training, pieces):
            assert pieces == ALL or pieces == frozenset(("optimizer",))
            assert not training.offload or training.moments == "fp32"  # one or the other
            tiers = {None: 120, "states": 79, "gradients": 76}
            moments = {"bf16": 75, "8bit": 73, "4bit": 72}
            return memory(moments.get(training.moments, tiers[training.offload]))

        peaks = {"stock": 70, "+loss": 65, "+AdamW": 120, "+packing": 70, "all": 110}
        results = {column: memory(bytes) for column, bytes in peaks.items()}
        training = Training(llama(), dtype="bf16")
        said, fits = estimate._advice(training, results, limit, measured)
        assert sentence in said
        assert fits == {column: bytes <= limit for column, bytes in peaks.items()}

    def test_the_title_says_what_the_dtype_makes_of_stocks_moments(self, folder, capsys):
        shape = ("--max-tokens", 16)
        _, said = run(capsys, folder, *shape)
        assert "stock: adamw_torch_fused, its moments in bf16" in said.out
        assert "fastft: fp32 moments, exact rounding" in said.out
        _, said = run(capsys, folder, *shape, "--dtype", "fp32")
        assert "in bf16" not in said.out and "rounding" not in said.out

    def test_auto_takes_the_first_tier_that_fits(self, folder, capsys, tmp_path):
        out, shape = tmp_path / "found.json", ("--max-tokens", 16, "--only", "loss,optimizer")
        code, said = run(
            capsys, folder, *shape, "--offload", "auto", "--memory", "2GB", "--json", out
        )
        assert code == 0, said.err
        assert "--offload auto takes none, as all fits on the device" in said.out
        assert "loss + optimizer fits" in said.out
        assert json.loads(out.read_text())["offload"] is None

    @pytest.mark.parametrize(
        ("limit", "tier", "words"),
        [
            (100, None, "takes none, as all"),
            (99, "states", "takes states, as none takes 0.0000 GiB"),
            (10, "gradients", "takes gradients, as none takes 0.0000 GiB and states takes 0.0000"),
            (5, "gradients", "takes gradients, as none"),
        ],
    )
    def test_the_first_tier_that_fits(self, limit, tier, words):
        def measured(training, pieces):
            peak = Peak({None: 100, "states": 40, "gradients": 10}[training.offload], {}, "step", 0)
            return Memory(peak, Peak(0, {}, "evaluation", 0))

        columns = {"all": (Training(llama()), ALL)}
        training, changed, said = estimate._tier_that_fits(
            Training(llama()), columns, limit, measured
        )
        assert training.offload == changed["all"][0].offload == tier
        assert words in said

    def test_each_has_a_column_for_each_tier(self, folder, capsys):
        code, said = run(capsys, folder, "--max-tokens", 16, "--offload", "each", "--memory", "2GB")
        assert code == 0, said.err
        for word in (
            "stock",
            *estimate.TIERS,
            "on the host",
            "stock and none and states and gradients",
        ):
            assert word in said.out

    def test_the_choices_of_rounding_are_those_of_the_optimizer(self):
        actions = {action.dest: action for action in estimate._parser()._actions}
        assert tuple(actions["rounding"].choices) == ROUNDINGS


def test_a_shape_that_depends_on_numbers_is_refused():
    with Unallocated(), pytest.raises(UnknownNumbers, match="nonzero"):
        (torch.randn(5) > 0).nonzero()


def test_label_smoothing_of_padded_rows_is_estimated_too_high():
    training = Training(llama(), **HALF, label_smoothing=0.1)
    counted, estimated = (
        measure(training, frozenset(("loss",)), counter).training.bytes
        for counter in (LiveMemory(), Unallocated())
    )
    assert counted < estimated < 2 * counted


def test_a_piece_that_does_not_fit_the_model_has_a_sentence(tmp_path, capsys):
    bert("BertForSequenceClassification").save_pretrained(tmp_path)
    code, said = run(capsys, tmp_path / "config.json", "--max-tokens", 16)
    assert code == 0, said.err
    assert "+packing: packing of a classifier of whole texts is not estimated" in said.out


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--memory", "much"), "--memory must be an amount of memory like 24GB, got 'much'"),
            (("--memory", "0GB"), "--memory must be"),
            (("--memory", "24"), "--memory must be an amount of memory like 24GB, got '24'"),
            (("--overhead", "x", "--memory", "1GB"), "--overhead must be"),
            (("--rows", "0"), "--rows must be at least 1, got 0"),
            (("--max-tokens", "1"), "--max-tokens must be at least 2"),
            (("--padding", "1.0"), "--padding must be a share"),
            (("--padding", "0.5"), "too much for --rows 1"),
            (("--lora", "-1"), "--lora must be at least 0"),
            (("--autocast",), "add --dtype fp32"),
            (("--moments", "2bit"), "invalid choice"),
            (("--optim", "sgdd"), "sgdd"),
            (("--offload", "auto"), "add --memory 24GB e.g."),
            (("--offload", "each", "--only", "loss"), "leave out --only"),
            (("--release-gradients", "--offload", "states"), "take one of them"),
            (("--release-gradients", "--accumulation", "2"), "take --offload gradients"),
            (("--offload", "states", "--only", "loss"), "which --only loss leaves out"),
            (("--json", "/no/such/folder/x.json"), "there is no folder"),
        ],
    )
    def test_an_option_is_refused_with_its_name(self, folder, capsys, options, words):
        code, said = run(capsys, folder, *options)
        assert code == 2
        assert words in said.err
        assert not said.out

    @pytest.mark.parametrize("name", ["./nowhere", "nowhere.json", "/no/such/folder"])
    def test_a_file_that_is_not_there(self, capsys, name):
        code, said = run(capsys, name)
        assert code == 2 and f"there is no file or folder '{name}'" in said.err

    def test_a_folder_without_a_configuration(self, tmp_path, capsys):
        code, said = run(capsys, tmp_path)
        assert code == 2 and "no configuration of a model in" in said.err

    def test_a_hub_that_is_not_reached(self, capsys, monkeypatch):
        def unreachable(name, **options):
            raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {name}")

        monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", unreachable)
        code, said = run(capsys, "somebody/some-model")
        assert code == 2 and "couldn't connect" in said.err

    @pytest.mark.parametrize(
        ("kind", "architecture"),
        [
            (transformers.ViTConfig, "ViTForImageClassification"),
            (transformers.WhisperConfig, "WhisperForConditionalGeneration"),
            (transformers.WhisperConfig, None),
        ],
    )
    def test_a_model_that_is_neither_a_language_model_nor_a_classifier_of_texts(
        self, kind, architecture, tmp_path, capsys
    ):
        kind(architectures=[architecture] if architecture else None).save_pretrained(tmp_path)
        code, said = run(capsys, tmp_path)
        assert code == 2 and "there is no training to estimate" in said.err

    def test_more_tokens_than_positions(self, tmp_path, capsys):
        bert("BertForMaskedLM").save_pretrained(tmp_path)
        code, said = run(capsys, tmp_path, "--max-tokens", 600)
        assert code == 2 and "the model has 512 positions, a row 600 tokens" in said.err


def _held():
    """Bytes of this process in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
