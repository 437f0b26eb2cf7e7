"""The base class of errors that a user caused, and can fix."""


class UserError(Exception):
    """The message says what is wrong and what to do: a program may print it in the place of a traceback.

    `dpkernels.privacy.BudgetExhausted`, `LedgerError` and `SelfCheckError` are such errors.
    """
