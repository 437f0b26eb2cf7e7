"""The CPU library under gcc's sanitizers: `python -m tests.sanitize` (`make sanitize`), `--threads` for data races.

A copy of the sources in build/sanitize gets a library built with them (CMakeLists.txt: DPK_SANITIZE), so every process
that a test starts there loads that one, and a fault can be planted in it.
"""
