"""The keys of a packed batch, each named once, for the collator and all who read its batches.

Those of the examples, `input_ids`, `labels`, `attention_mask` and the like, are transformers' names
and stand where they are used.
"""

from __future__ import annotations

from collections.abc import Collection

# where segments begin in the R * T tokens, and R * T: of the queries and of the keys of attention
CU_SEQLENS_Q, CU_SEQLENS_K = "cu_seq_lens_q", "cu_seq_lens_k"
MAX_LENGTH_Q, MAX_LENGTH_K = "max_length_q", "max_length_k"  # the longest segment
SEQ_IDX = "seq_idx"  # the segment of each token
# the same of a decoder beside an encoder
DECODER_CU_SEQLENS, DECODER_MAX_LENGTH = "decoder_cu_seq_lens", "decoder_max_length"
DECODER_POSITIONS = "decoder_position_ids"
SOUNDS = ("input_features", "input_values")  # what an encoder of speech reads
PADDING_LENGTHS = "padding_lengths"  # padding at the end of each row, for a router's loss
LABEL_SEGMENTS = "label_segments"  # the segment of each label, where examples are labelled
USE_CACHE = "use_cache"
# of the logits that are computed, and the labels of these
LOGITS_TO_KEEP, SHIFT_LABELS = "logits_to_keep", "shift_labels"

# what attention reads: it keeps the segments apart by these
BOUNDARY_KEYS = (
    CU_SEQLENS_Q,
    CU_SEQLENS_K,
    MAX_LENGTH_Q,
    MAX_LENGTH_K,
    SEQ_IDX,
    DECODER_CU_SEQLENS,
    DECODER_MAX_LENGTH,
)
# names that no column of the examples may have; the others of BOUNDARY_KEYS, as other tools write
# them, say where the documents of a row begin
RESERVED = (
    MAX_LENGTH_Q,
    MAX_LENGTH_K,
    PADDING_LENGTHS,
    USE_CACHE,
    LABEL_SEGMENTS,
    DECODER_CU_SEQLENS,
    DECODER_MAX_LENGTH,
)
# what processors give of images and videos beside tokens, by the beginnings of its names; it has
# numbers for images, patches or pixels, as many as they need
_OF_IMAGES = (
    *("pixel_", "image_", "images_", "video_", "second_per_grid", "num_images", "num_tiles"),
    *("num_local_patches", "patches_grid", "spatial_shapes", "target_sizes", "tile_"),
    *("aspect_ratio_", "cross_attention_mask", "batch_num_images", "flattened_patches"),
)
# labels of whole examples, as transformers' collators take them
LABEL_KEYS = ("labels", "label", "label_ids")
IGNORE_INDEX = -100  # of labels that count for nothing, in torch and transformers


def is_of_images(key: str) -> bool:
    """Tells by its name whether a key holds images or videos, or numbers of these."""
    return key.startswith(_OF_IMAGES)


def refuse_reserved(columns: Collection[str], also: Collection[str] = ()) -> None:
    """Raises ValueError where a column has a name of `RESERVED` or `also`."""
    taken = next(filter(columns.__contains__, (*also, *RESERVED)), None)
    if taken is not None:
        raise ValueError(
            f"the examples have a column {taken!r}, which the collator makes itself: rename it"
        )
