"""The measurement: sessions, timers, floors, memory, agreement with the exact result, the machine, and result files.

This folder imports `cases` and `contenders`.
"""
