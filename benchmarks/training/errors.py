"""The one exception for mistakes in what the user gave."""


class UserError(Exception):
    """A wrong option, path or file. The command line prints its text as one line and exits with code 2."""
