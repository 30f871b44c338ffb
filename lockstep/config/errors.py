"""The error of a setting that cannot be."""


class ConfigError(ValueError):
    """A setting is impossible. The message names the setting, its value, the rule and what to do."""


class UnsupportedError(ConfigError):
    """A checkpoint asks for something, `what` in words, that the engine does not compute; nothing is wrong with its config."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what
