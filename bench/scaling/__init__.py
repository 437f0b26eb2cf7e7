"""Several processes: time and bytes of a step on one and on two of them here, and a calculated step on many GPUs.

This folder imports `cases`, `contenders`, `harness`, `compare` and, for the calculation, `asr`.
"""
