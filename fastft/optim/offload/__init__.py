"""Optimizer states and gradients on the host: less memory on the device, the same bits.

Bytes of a bf16 parameter that stay on the device between steps, with `rounding="exact"`:

    offload        on the device                  on the host, fp32 / bf16 / 8-bit moments
    None           2 + 2 + 2 + 8 / 4 / 2.06       0
    "states"       2 (weight) + 2 (gradient)      10 / 6 / 4.06
    "gradients"    2 (weight)                     12 / 8 / 6.06
    "overlap"      2 (weight)                     12 / 8 / 6.06

beside two staging buffers. Where a state lies changes no bit of what is trained: the same kernels
compute on the same numbers, a piece at a time.
"""
