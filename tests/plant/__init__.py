"""Faults planted into a copy of the sources: `python -m tests.plant` shows that the default suite catches each of them.

`lines/` holds, for each property of the privacy design, the tests that hold it and the faults that they catch. The
table in tests/privacy/README.md is written from it.
"""
