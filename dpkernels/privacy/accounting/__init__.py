"""What was spent: the accountants, the budget of a run, and the ledger on disk.

This folder imports `sampling` for the plan that it accounts for; only the engine and its set-up import it.
"""
