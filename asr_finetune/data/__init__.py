"""Recordings and their transcripts: sources, problems, and the figures that a run records about them.

It may import from `config`; nothing here depends on a model.
"""
