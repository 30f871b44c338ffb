"""The error of a setting that cannot be."""


class ConfigError(ValueError):
    """A setting is impossible. The message names the setting, its value, the rule and what to do."""
