"""What one backward leaves behind: records, the tape that collects them, and the base class of ghost layers.

This folder imports `dpkernels.nn.batch` and the files directly in `dpkernels.nn`; the layers and `convert` import it.
"""
