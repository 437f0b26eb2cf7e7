"""From a model to a private one and back: swapping layers, attaching the tape, the coverage table, and `fix`.

This folder may import every other folder of `dpkernels.nn`; none of them imports it.
"""
