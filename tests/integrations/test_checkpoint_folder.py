"""A training that could not save, or would go on from a half checkpoint, does not begin, and says
why."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch
from support.plugged import trainer_of
from support.trainers import logged
from transformers import Trainer, TrainerCallback

import fastft
from fastft.integrations import checkpoint_folder

STEPS, SAVED = 4, 2
STATE = checkpoint_folder.STATE
# which nobody reads when a training goes on
NOT_NEEDED = {"config.json", "generation_config.json", "training_args.bin"}
NOT_NEEDED |= {"tokenizer.json", "tokenizer_config.json"}


def training(folder, *, plug=True, **changes):
    """bf16 weights with their low bits, a checkpoint of several shards every two steps."""
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    trainer = trainer_of(folder, **{**saving, **changes})
    trainer.model.to(torch.bfloat16)
    if plug:
        fastft.plug(trainer, seed=5)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training from its beginning to its end."""
    trainer = training(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of its checkpoints."""
    return shutil.copytree(whole.args.output_dir, tmp_path / "copy")


def refusal(folder, resume=True, **changes):
    """The sentence with which a training does not go on; the model is as it was."""
    trainer = training(folder, **changes)
    before = [param.clone() for param in trainer.model.parameters()]
    with pytest.raises(ValueError) as raised:
        trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 0 and trainer.optimizer is None
    assert all(map(torch.equal, trainer.model.parameters(), before))
    return str(raised.value)


def goes_on(folder, whole, resume):
    """The training goes on to the bits of the one that was not interrupted."""
    trainer = training(folder)
    trainer.train(resume_from_checkpoint=resume)
    assert logged(trainer) == logged(whole) and len(logged(whole)) == STEPS
    assert all(map(torch.equal, trainer.model.parameters(), whole.model.parameters()))


def damages(path):
    """Ways in which a file may be half, or not there."""
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 2):  # the last byte of JSON ends a line
        yield functools.partial(path.write_bytes, content[:length])
    yield path.unlink


def test_each_file_of_a_checkpoint_is_whole_or_named(folder, whole):
    last, before = folder / f"checkpoint-{STEPS}", folder / f"checkpoint-{SAVED}"
    files = sorted(path.name for path in last.iterdir())
    assert len(files) >= 7
    for name in set(files) - NOT_NEEDED:
        content = (last / name).read_bytes()
        for damage in damages(last / name):
            damage()
            text = refusal(folder)
            assert f"the checkpoint {last} is not whole: {name} is " in text
            assert f"resume_from_checkpoint={str(before)!r}" in text
            (last / name).write_bytes(content)
    goes_on(folder, whole, str(before))


@pytest.mark.parametrize(
    ("file", "beside"),
    [
        ("optimizer.pt", "optimizer_notes.txt"),
        ("optimizer.pt", "optimizer.pt.bak"),
        ("scheduler.pt", "scheduler.pth"),
        ("rng_state.pth", "rng_state.txt"),
    ],
)
def test_a_file_of_the_users_hides_none_that_is_missing(folder, file, beside):
    last = folder / f"checkpoint-{STEPS}"
    (last / file).rename(last / beside)
    assert f"{file} is missing" in refusal(folder)


@pytest.mark.parametrize(
    "names",
    [
        {"optimizer.bin", "scheduler.pt", "rng_state_0.pth"},  # FSDP, whole
        {"optimizer_0", "scheduler.pt", "rng_state_1.pth"},  # FSDP, in parts
        {"optimizer_0_rank1.bin", "scheduler.pt", "rng_state_1.pth"},
        {"rank0-of-8-optimizer.pt", "scheduler.pt", "rng_state.pth"},  # XLA
        {"optimizer.pt_0_1", "scheduler.pt", "rng_state.pth"},  # SageMaker
    ],
)
def test_names_that_other_ways_of_training_have(folder, names):
    last = folder / f"checkpoint-{STEPS}"
    found = checkpoint_folder._files_missing(last, {STATE, "a.bin", *names}, training(folder))
    assert list(found) == []


@pytest.mark.parametrize("content", ["null", "[]", "{}", '"x"', "3", '{"global_step": 2}'])
def test_json_that_is_no_state_is_named(folder, content):
    (folder / f"checkpoint-{STEPS}" / STATE).write_text(content)
    assert f"{STATE} is damaged: it has not what Trainer writes there. Go on from" in refusal(
        folder
    )


def test_torchs_files_of_old_are_taken(folder, whole):
    first = folder / f"checkpoint-{SAVED}"
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save(
            torch.load(first / name, weights_only=True),
            first / name,
            _use_new_zipfile_serialization=False,
        )
    (first / "notes.bin").write_text("a user's")
    goes_on(folder, whole, str(first))


def test_files_that_nobody_reads_may_be_missing(folder, whole):
    for name in NOT_NEEDED:
        (folder / f"checkpoint-{SAVED}" / name).unlink()
    goes_on(folder, whole, str(folder / f"checkpoint-{SAVED}"))


def test_a_missing_shard_is_named(folder):
    last = folder / f"checkpoint-{STEPS}"
    model = training(folder).model
    (last / "model.safetensors").unlink()
    model.save_pretrained(last, max_shard_size=10_000)
    shards = sorted(last.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    assert f"{shards[1].name} is missing, which model.safetensors.index.json" in refusal(folder)


def test_files_that_trainer_does_not_read_may_be_anything(folder, whole):
    """The user's, and an index of shards that a save into one file has left."""
    first = folder / f"checkpoint-{SAVED}"
    for name in ("notes.json", "chat.index.json", "merges.safetensors.index.json"):
        (first / name).write_text("half of {")
    (first / "folder.json").mkdir()
    (first / "gone").symlink_to(first / "nowhere")
    (first / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1"}}')
    goes_on(folder, whole, str(first))


def test_links_to_files_and_folders(folder, whole):
    first = folder / f"checkpoint-{SAVED}"
    shutil.move(first, folder / "elsewhere")
    first.symlink_to(folder / "elsewhere")
    weights = first / "model.safetensors"
    weights.rename(folder / "blob")
    weights.symlink_to(folder / "blob")
    goes_on(folder, whole, str(first))
    (folder / "blob").unlink()
    assert "model.safetensors is there, but cannot be read" in refusal(folder, str(first))


def test_half_an_adapter_in_a_folder_of_its_own_is_named(folder):
    own = folder / f"checkpoint-{STEPS}" / "second"
    own.mkdir()
    (own / "adapter_model.safetensors").write_bytes(b"half")
    assert "adapter_model.safetensors is cut off" in refusal(folder)


class OwnWeights(Trainer):
    """Keeps weights under a name of its own."""

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(exist_ok=True)
        torch.save(self.model.state_dict(), f"{output_dir}/weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(torch.load(f"{resume_from_checkpoint}/weights.pt"))


def test_a_trainer_with_weights_of_its_own(tmp_path, whole):
    training(tmp_path, kind=OwnWeights).train()
    again = training(tmp_path, kind=OwnWeights)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert logged(again) == logged(whole)


def test_a_process_that_does_not_save_leaves_what_is_saved(folder, monkeypatch):
    """It may come to the save when the one that does has written everything."""
    last = folder / f"checkpoint-{STEPS}"
    trainer = training(folder)
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
    trainer.save_model(str(last), _internal_call=True)
    assert (last / "trainer_state.json").exists()


def test_an_output_folder_that_is_not_there_yet(tmp_path):
    trainer = training(tmp_path / "out")
    (tmp_path / "out").rmdir()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_where_none_is_whole_it_says_to_begin_anew(folder):
    for step in (SAVED, STEPS):
        (folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    text = refusal(folder, str(folder / f"checkpoint-{STEPS}"))
    assert "trainer_state.json is missing" in text and "Begin anew" in text


def test_weights_alone_are_no_half_checkpoint(tmp_path):
    training(tmp_path, save_only_model=True).train()
    again = training(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert again.state.global_step == STEPS


class Stop(TrainerCallback):
    """Ends a training in the middle of a save, behind the weights."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        def interrupted():
            raise KeyboardInterrupt

        optimizer.state_dict = interrupted


def test_a_save_over_a_checkpoint_of_another_training_is_no_mixture(folder):
    """Trainer numbers checkpoints by steps: the files not yet reached are the other's."""
    other = training(folder, seed=11, learning_rate=1e-3)
    other.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        other.train()
    text = refusal(folder, str(folder / f"checkpoint-{SAVED}"))
    assert "trainer_state.json is missing" in text


def test_a_file_where_a_checkpoint_is_to_be(tmp_path):
    (tmp_path / f"checkpoint-{SAVED}").write_text("")
    text = refusal(tmp_path, None)
    assert f"args.output_dir={str(tmp_path)!r} cannot take" in text
    assert f"checkpoint-{SAVED} in it is a file" in text
    trainer = training(tmp_path, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder.os, "access", lambda path, mode: False)
    assert "it is read-only" in refusal(tmp_path, None)


def test_a_folder_that_has_become_a_file(tmp_path):
    trainer = training(tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="cannot take the checkpoints of this training"):
        trainer.train()


def test_plug_takes_off_what_it_put_on(tmp_path):
    trainer = training(tmp_path, plug=False)
    before = dict(vars(trainer))
    fastft.plug(trainer).restore()
    assert vars(trainer) == before


@pytest.mark.parametrize(
    ("known", "processes", "rank", "missing"),
    [
        ([0], 2, 1, True),
        ([1], 2, 0, True),
        ([0, 2], 3, 1, True),
        ([0, 1], 4, 2, False),  # saved by two processes, for all that is known
        ([], 2, 1, False),  # by one
        ([0, 1], 1, 0, False),  # by two
    ],
)
def test_random_states_of_processes(known, processes, rank, missing):
    class Arguments:
        world_size, process_index = processes, rank

    names = {f"rng_state_{number}.pth" for number in known} or {"rng_state.pth"}
    found = list(checkpoint_folder._random_state_missing(names, Arguments))
    assert bool(found) == missing and all(f"rng_state_{rank}.pth is missing" in x for x in found)
