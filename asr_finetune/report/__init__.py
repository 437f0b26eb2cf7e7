"""The privacy report of a finished run, and its plots.

It may import from `training`, `models`, `data` and `config`, but not from `planning`.
"""
