"""Ray Train with two workers, Trainer inside, and one line: `plug` before Ray's `prepare_trainer`.

python examples/ray_train.py
"""

from pathlib import Path

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_of_a_worker() -> None:
    import small_llama
    import stdlib_text
    import torch
    from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import fastft

    tokenizer, examples = stdlib_text.load(vocab_size=4096, max_tokens=256)
    args = TrainingArguments(
        "checkpoints",
        use_cpu=not torch.cuda.is_available(),  # else each worker would train alone
        per_device_train_batch_size=4,
        max_steps=10,
        learning_rate=1e-3,
        logging_steps=5,
        save_steps=10,
        report_to="none",
    )
    trainer = Trainer(
        model=small_llama.make(len(tokenizer)),
        args=args,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads input_ids and labels
        callbacks=[RayTrainReportCallback()],
    )
    plugged = fastft.plug(trainer)
    prepare_trainer(trainer).train()
    print(f"fused losses: {plugged.report.fused}")


result = TorchTrainer(
    train_of_a_worker,
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=str(Path("out/ray").resolve())),
).fit()
print(f"last loss: {result.metrics['loss']:.3f}")
