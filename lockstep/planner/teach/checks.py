"""What a simulator asks of its settings, said in one way."""

from __future__ import annotations

from fractions import Fraction

from lockstep.config.errors import ConfigError


def within(name: str, value: float, least: float, most: float) -> None:
    """Raise ConfigError unless least <= value <= most."""
    if not least <= value <= most:
        raise ConfigError(f"{name}={value} is outside {least:g} to {most:g}: choose a value in between.")


LARGEST = 10**15  # of a list's numbers: exact ones have no limit of their own, and 1e400 fills the screen


def numbers(name: str, text: str, *, zero: bool = False, like: str = "1,1,2 or 1,1/2") -> tuple[Fraction, ...]:
    """ "1,1/2,0.25" as exact fractions above 0, or of at least 0 with `zero`, and up to LARGEST. Raises ConfigError."""
    try:
        found = tuple(Fraction(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{name}={text!r} is not a list of numbers: write them like {like}.") from None
    if any(value < 0 or (value == 0 and not zero) for value in found):
        raise ConfigError(
            f"{name}={text!r} has a value {'below 0' if zero else 'of 0 or less'}: every one of them must be above{' or at' * zero} it."
        )
    if any(value > LARGEST or value.denominator > LARGEST for value in found):
        raise ConfigError(f"{name}={text!r} has a value beyond {LARGEST:.0e} or finer than its inverse: choose another unit.")
    return found


def whole(name: str, text: str) -> tuple[int, ...]:
    """ "1,8,64" as integers above 0. Raises ConfigError."""
    found = numbers(name, text, like="1,8,64")
    if any(value.denominator != 1 for value in found):
        raise ConfigError(f"{name}={text!r} has a value that is not whole: write integers, like 1,8,64.")
    return tuple(int(value) for value in found)
