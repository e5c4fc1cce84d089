"""The exception type for errors that are shown to users."""


class UserError(Exception):
    """An error caused by the user or the environment; `mlxgpt` prints it and exits with status 2.

    Args:
        problem: what is wrong, in one line.
        remedy: what to do about it, in one line.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy
