"""The one exception that means "the user can put this right": the command line prints it and exits with 2."""


class CRDError(Exception):
    """A message that names the setting or file, the value found, what was expected and what to do."""
