"""Optimizer states and gradients on the host: less memory on the device, the same bits.

Bytes of a bf16 parameter that stay on the device between steps, with `rounding="exact"`:

    offload        on the device                    on the host, fp32 / bf16 / 8- / 4-bit moments
    None           2 + 2 + 2 + 8 / 4 / 2.06 / 1.56  0
    "states"       2 (weight) + 2 (gradient)        10 / 6 / 4.06 / 3.56
    "gradients"    2 (weight)                       12 / 8 / 6.06 / 5.56
    "overlap"      2 (weight)                       12 / 8 / 6.06 / 5.56

beside two staging buffers. Where a state lies changes no bit of what is trained: the same kernels
compute on the same numbers, a piece at a time.
"""
