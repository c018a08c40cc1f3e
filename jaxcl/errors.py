"""The one exception of user mistakes: its message is a single line fit for a terminal."""


class UserError(ValueError):
    """Wrong input: names the field, the value and what is allowed. Raised before anything expensive starts."""
