"""The public training scripts that `compare_public.py` runs, each with what it is given: data only.

A path is below the folder of clones: the first part names the repository. `needs` are the models
and data sets that `public_folder.py` makes; the arguments are the scripts' own.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL = "loss,optimizer,packing"
REPOSITORIES = {
    "transformers": "https://github.com/huggingface/transformers",
    "peft": "https://github.com/huggingface/peft",
    "trl": "https://github.com/huggingface/trl",
    "accelerate": "https://github.com/huggingface/accelerate",
}


@dataclass(frozen=True)
class PublicScript:
    """A script, its arguments as a shell reads them, and the names of what it loads.

    `pieces`: those of the runs with fastft. With packing, `compare` switches dropout off.
    """

    path: str
    arguments: str
    needs: tuple[str, ...]
    pieces: str = "loss,optimizer"

    @property
    def name(self) -> str:
        """Of the file, without repository, folders and ending."""
        return self.path.rpartition("/")[2].removesuffix(".py")


HF = "transformers/examples/pytorch/"
TRAINER = (
    "--do_train --max_steps 20 --per_device_train_batch_size 8 --save_strategy no --output_dir out"
)
LOOP = "--max_train_steps 20 --per_device_train_batch_size 8 --seed 1 --output_dir out"
TRL = (
    "--per_device_train_batch_size 4 --save_strategy no --report_to none --use_cpu --bf16 False "
    "--max_steps 20 --output_dir out"
)
PEFT = (
    "--base_model tiny-llama --output_dir out --batch_size 4 --cutoff_len 128 --dtype float32 "
    "--device_map cpu --seed 1"
)
CLM = "--train_file text.json --block_size 128"
XSUM = "--train_file summary.json --text_column text --summary_column summary"
EN_RO = "--source_lang en --target_lang ro --train_file translation.json"

SCRIPTS = (
    PublicScript(
        HF + "language-modeling/run_clm.py",
        f"--model_name_or_path tiny-gpt2 {CLM} {TRAINER}",
        ("tiny-gpt2", "text.json"),
    ),
    PublicScript(
        HF + "language-modeling/run_clm_no_trainer.py",
        f"--model_name_or_path tiny-llama {CLM} {LOOP}",
        ("tiny-llama", "text.json"),
    ),
    PublicScript(
        HF + "language-modeling/run_mlm.py",
        "--model_name_or_path bert-base-cased --train_file text.json --line_by_line "
        f"--max_seq_length 128 {TRAINER}",
        ("bert-base-cased", "text.json"),
        ALL,
    ),
    PublicScript(
        HF + "text-classification/run_glue.py",
        f"--model_name_or_path bert-base-cased --task_name mrpc {TRAINER}",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
        ALL,
    ),
    PublicScript(
        HF + "text-classification/run_glue_no_trainer.py",
        f"--model_name_or_path bert-base-cased --task_name mrpc {LOOP}",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        HF + "text-classification/run_classification.py",
        "--model_name_or_path bert-base-cased --train_file labelled.json "
        "--validation_file labelled.json --text_column_names sentence "
        f"--label_column_name label {TRAINER}",
        ("bert-base-cased", "labelled.json"),
    ),
    PublicScript(
        HF + "text-classification/run_xnli.py",
        f"--model_name_or_path bert-base-cased --language en {TRAINER}",
        ("bert-base-cased", "xnli:en"),
    ),
    PublicScript(
        HF + "token-classification/run_ner.py",
        f"--model_name_or_path bert-base-cased --dataset_name tagged {TRAINER}",
        ("bert-base-cased", "tagged"),
        ALL,
    ),
    PublicScript(
        HF + "token-classification/run_ner_no_trainer.py",
        f"--model_name_or_path bert-base-cased --dataset_name tagged {LOOP}",
        ("bert-base-cased", "tagged"),
    ),
    PublicScript(
        HF + "question-answering/run_qa.py",
        f"--model_name_or_path bert-base-cased --dataset_name squad {TRAINER}",
        ("bert-base-cased", "squad"),
        ALL,
    ),
    PublicScript(
        HF + "question-answering/run_qa_no_trainer.py",
        f"--model_name_or_path bert-base-cased --dataset_name squad {LOOP}",
        ("bert-base-cased", "squad"),
    ),
    PublicScript(
        HF + "question-answering/run_seq2seq_qa.py",
        "--model_name_or_path t5-base --dataset_name squad --context_column context "
        f"--question_column question --answer_column answers {TRAINER}",
        ("t5-base", "squad"),
    ),
    PublicScript(
        HF + "multiple-choice/run_swag.py",
        f"--model_name_or_path bert-base-cased --train_file choice.json {TRAINER}",
        ("bert-base-cased", "choice.json"),
    ),
    PublicScript(
        HF + "multiple-choice/run_swag_no_trainer.py",
        "--model_name_or_path bert-base-cased --train_file choice.json "
        f"--validation_file choice.json {LOOP}",
        ("bert-base-cased", "choice.json"),
    ),
    PublicScript(
        HF + "summarization/run_summarization.py",
        f"--model_name_or_path t5-base {XSUM} --source_prefix summarize: {TRAINER}",
        ("t5-base", "summary.json"),
    ),
    PublicScript(
        HF + "summarization/run_summarization_no_trainer.py",
        f"--model_name_or_path t5-base {XSUM} --validation_file summary.json {LOOP}",
        ("t5-base", "summary.json"),
    ),
    PublicScript(
        HF + "translation/run_translation.py",
        f"--model_name_or_path facebook/bart-base {EN_RO} {TRAINER}",
        ("facebook/bart-base", "translation.json"),
    ),
    PublicScript(
        HF + "translation/run_translation_no_trainer.py",
        f"--model_name_or_path facebook/bart-base {EN_RO} "
        f"--validation_file translation.json {LOOP}",
        ("facebook/bart-base", "translation.json"),
    ),
    PublicScript(
        "trl/trl/scripts/sft.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/Capybara {TRL}",
        ("tiny-qwen2", "trl-lib/Capybara"),
    ),
    PublicScript(
        "trl/trl/scripts/dpo.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/ultrafeedback_binarized {TRL}",
        ("tiny-qwen2", "trl-lib/ultrafeedback_binarized"),
    ),
    PublicScript(
        "trl/trl/scripts/kto.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/kto-mix-14k {TRL}",
        ("tiny-qwen2", "trl-lib/kto-mix-14k"),
    ),
    PublicScript(
        "trl/trl/scripts/reward.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/ultrafeedback_binarized {TRL}",
        ("tiny-qwen2", "trl-lib/ultrafeedback_binarized"),
    ),
    PublicScript(
        "trl/trl/scripts/grpo.py",
        "--model_name_or_path tiny-qwen2 --dataset_name prompts --num_generations 4 "
        f"--max_completion_length 16 --reward_funcs think_format_reward {TRL}",
        ("tiny-qwen2", "prompts"),
    ),
    PublicScript(
        "trl/trl/scripts/rloo.py",
        "--model_name_or_path tiny-qwen2 --dataset_name prompts --num_generations 4 "
        f"--max_completion_length 16 --reward_funcs think_format_reward {TRL}",
        ("tiny-qwen2", "prompts"),
    ),
    PublicScript(
        "trl/examples/scripts/orpo.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/ultrafeedback_binarized {TRL}",
        ("tiny-qwen2", "trl-lib/ultrafeedback_binarized"),
    ),
    PublicScript(
        "trl/examples/scripts/cpo.py",
        f"--model_name_or_path tiny-qwen2 --dataset_name trl-lib/ultrafeedback_binarized {TRL}",
        ("tiny-qwen2", "trl-lib/ultrafeedback_binarized"),
    ),
    PublicScript(
        "trl/examples/scripts/gkd.py",
        "--model_name_or_path tiny-qwen2 --teacher_model_name_or_path tiny-llama "
        f"--dataset_name trl-lib/Capybara --max_new_tokens 16 {TRL}",
        ("tiny-qwen2", "tiny-llama", "trl-lib/Capybara"),
    ),
    PublicScript(
        "peft/examples/olora_finetuning/olora_finetuning.py",
        PEFT,
        ("tiny-llama", "yahma/alpaca-cleaned"),
    ),
    PublicScript(
        "peft/examples/waveft_finetuning/waveft_finetuning.py",
        f"{PEFT} --waveft_n_frequency 512",
        ("tiny-llama", "yahma/alpaca-cleaned"),
    ),
    PublicScript(
        "peft/examples/shira_finetuning/shira_finetuning.py",
        f"{PEFT} --shira_r 8",
        ("tiny-llama", "yahma/alpaca-cleaned"),
    ),
    PublicScript(
        "peft/examples/hira_finetuning/hira_finetuning.py",
        PEFT,
        ("tiny-llama", "yahma/alpaca-cleaned"),
    ),
    PublicScript(
        "peft/examples/glora_finetuning/glora_finetuning.py",
        PEFT,
        ("tiny-llama", "yahma/alpaca-cleaned"),
    ),
    PublicScript(
        "peft/examples/miss_finetuning/miss_finetuning.py",
        "--base_model_name_or_path tiny-llama --bits fp32 --data_path meta-math/MetaMathQA "
        f"--dataset_split train --dataset_field query response {TRL}",
        ("tiny-llama", "meta-math/MetaMathQA"),
    ),
    PublicScript(
        "peft/examples/unilora_finetuning/unilora_finetuning.py",
        "--base_model_name_or_path tiny-llama --bits fp32 --data_path meta-math/MetaMathQA "
        f"--dataset_split train --dataset_field query response {TRL}",
        ("tiny-llama", "meta-math/MetaMathQA"),
    ),
    PublicScript(
        "peft/examples/kasa_finetuning/kasa_finetuning.py",
        "--base_model_name_or_path tiny-llama --data_path timdettmers/openassistant-guanaco "
        f"--dataset_split train {TRL}",
        ("tiny-llama", "timdettmers/openassistant-guanaco"),
    ),
    PublicScript(
        "peft/examples/sequence_classification/peft_no_lora_accelerate.py",
        "--model_name_or_path bert-base-cased --output_dir out --seed 1",
        ("bert-base-cased", "glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/nlp_example.py",
        "--cpu",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/complete_nlp_example.py",
        "--cpu --output_dir out",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/gradient_accumulation.py",
        "--cpu --gradient_accumulation_steps 2",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/gradient_accumulation_for_autoregressive_models.py",
        "--cpu --gradient_accumulation_steps 2 --per_device_batch_size 4",
        ("HuggingFaceTB/SmolLM-360M", "Salesforce/wikitext:wikitext-2-v1"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/deepspeed_with_config_support.py",
        f"--model_name_or_path tiny-llama {CLM} {LOOP}",
        ("tiny-llama", "text.json"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/local_sgd.py",
        "--cpu --gradient_accumulation_steps 2 --local_sgd_steps 4",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/memory.py",
        "--cpu",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/checkpointing.py",
        "--cpu --output_dir out",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/early_stopping.py",
        "--cpu",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
    PublicScript(
        "accelerate/examples/by_feature/ddp_comm_hook.py",
        "--cpu",
        ("bert-base-cased", "nyu-mll/glue:mrpc"),
    ),
)
