"""The configuration of a run: its keys, their checks, and the recipes that come with the package.

Of this package it imports only `console`, `files` and `hub`, which every folder may import.
"""
