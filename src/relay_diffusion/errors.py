"""The one exception that means "the user can mend this": the command line prints it as one line, exit code 2."""


class UserError(ValueError):
    """A mistake in an option, a file or a combination of them; the message names it and the remedy."""
