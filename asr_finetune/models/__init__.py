"""Recognisers: how they are loaded and saved, what of them is trained, and in which precision they compute.

It may import from `data` and `config`.
"""
