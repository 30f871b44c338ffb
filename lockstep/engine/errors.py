"""The error of a request that can never run."""

from __future__ import annotations


class RequestError(ValueError):
    """A request was refused. The message names the number that was broken, the rule and the remedy."""
