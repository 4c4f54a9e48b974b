class UserError(Exception):
    """A mistake of the user: one line that names the flag or file, what was expected and what was found. Scripts print it and exit with 2."""
