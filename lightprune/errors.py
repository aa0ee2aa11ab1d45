"""What lightprune raises when a run cannot work as it is configured."""


class ConfigError(ValueError):
    """A configuration that cannot work: one sentence with the value, the allowed ones and the key to change."""
