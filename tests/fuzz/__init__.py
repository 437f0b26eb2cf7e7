"""Random cases for the native CPU kernels and for the readers of files: `python -m tests.fuzz --cases 100000`.

A case is what the pair (seed, number) draws, so `--seed S --case K` computes it again, alone. `layers.py` and
`kernels.py` hold every native op against the reference; `readers.py` damages ledgers, checkpoints and listings.
"""
