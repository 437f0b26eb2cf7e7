"""The processes of a run: which they are, what they agree on, and the sums and parameters that they exchange.

Sampling, accounting, step and engine may import from here; nothing here imports from them.
"""
