"""Recognisers: loading, saving, trained parameters and precision.

It may import from `data` and `config`.
"""
