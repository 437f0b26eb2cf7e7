"""The base class of errors that a user can fix."""


class UserError(Exception):
    """An error whose message has the reason and the fix: a program may print it instead of a traceback.

    `dpkernels.privacy.BudgetExhausted`, `LedgerError` and `SelfCheckError` are such errors, and so is
    `dpkernels.nn.RowError`.
    """
