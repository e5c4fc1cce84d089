"""The one exception that a user may see."""


class UserError(Exception):
    """A mistake of the user or of the world around the program; `mlxgpt` exits with 2.

    Args:
        problem: one line on what is wrong.
        remedy: one line on what to do about it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy
