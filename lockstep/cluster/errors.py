"""The error of a request that cannot be sent anywhere."""

from __future__ import annotations


class RoutingError(ValueError):
    """No replica can take a request. The message names the rank or the replicas, the rule and the remedy."""
