"""The configuration of a run: its keys, their checks, and the recipes that come with the package.

It imports nothing else of this package but `console`, `files` and `hub`, which every folder may import.
"""
