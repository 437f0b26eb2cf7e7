"""Training and evaluation of a recogniser: the private loop, its checkpoints, and the output folder of a run.

It may import from `models`, `data` and `config`.
"""
