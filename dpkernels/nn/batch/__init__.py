"""Which rows belong to which example: the batch axis of every tensor, and tensors that all examples share.

This folder knows no layer and no record; everything else in `dpkernels.nn` may import it.
"""
