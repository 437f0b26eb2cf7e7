"""Output from result files: tables, plots, and the committed pages of docs/.

This folder imports `harness`, and measures nothing.
"""
