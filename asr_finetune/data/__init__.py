"""Recordings and their transcripts: where they come from, what is wrong with them, and what a run may say of them.

It may import from `config`; nothing here knows a model.
"""
