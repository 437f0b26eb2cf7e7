"""Plans of a run before it begins: noise, memory, time, and a dry run of its start.

It may import from `training`, `models`, `data` and `config`.
"""
