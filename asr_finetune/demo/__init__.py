"""The demo on synthetic speech, and the synthesiser.

It may import from every folder; only `cli` imports from it.
"""
