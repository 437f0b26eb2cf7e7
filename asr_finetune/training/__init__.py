"""Training and evaluation of a recogniser: the private loop, its checkpoints, and the folder that a run is written to.

It may import from `models`, `data` and `config`.
"""
