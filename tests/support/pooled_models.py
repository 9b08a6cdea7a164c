"""Small classifiers of several kinds of models, and labelled examples for them."""

from __future__ import annotations

import torch
import transformers

V = 61
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
ENCODER = {
    **{"vocab_size": V, **SIZES, "num_attention_heads": 2},
    **{"initializer_range": 0.2, "attn_implementation": "sdpa"},
}
DISTILLED = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
MODERN = {**ENCODER, "global_attn_every_n_layers": 1, "pad_token_id": 0, "initializer_range": 0.1}
MODELS = {
    "bert": ("Bert", ENCODER),
    "roberta": ("Roberta", {**ENCODER, "pad_token_id": 1}),
    "electra": ("Electra", {**ENCODER, "embedding_size": 16}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": V, **DISTILLED, "attn_implementation": "sdpa"},
    ),
    "modernbert cls": ("ModernBert", {**MODERN, "classifier_pooling": "cls"}),
    "modernbert mean": ("ModernBert", {**MODERN, "classifier_pooling": "mean"}),
    "llama": ("Llama", {**ENCODER, "pad_token_id": 0}),
    "llama without padding": ("Llama", ENCODER),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}),
}
LABELS = {
    "classes": (3, None, [0, 2, 1, 1, 2]),
    "regression": (1, "regression", [0.5, -1.0, 2.0, 0.0, 1.5]),
    "several": (
        3,
        "multi_label_classification",
        [[1.0, 0.0, 1.0], [0.0] * 3, [1.0] * 3, [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    ),
}


def classifier(name: str, labels: str = "classes") -> torch.nn.Module:
    kind, settings = MODELS[name]
    classes, problem_type, _ = LABELS[labels]
    config = getattr(transformers, f"{kind}Config")(
        **settings, num_labels=classes, problem_type=problem_type
    )
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def labelled_examples(labels: str, key: str = "label") -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    sizes = (5, 1, 9, 4, 3)
    ids = [torch.randint(5, V, (size,), generator=generator) for size in sizes]
    return [
        {"input_ids": one.tolist(), key: label}
        for one, label in zip(ids, LABELS[labels][2], strict=True)
    ]
