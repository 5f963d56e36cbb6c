"""What only one system has, out of a configuration's `options`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..experiment import Config


def checked_options(config: Config, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with the configuration's options in their places. Raises ValueError for a name that is not in `defaults`."""
    for name in config.options:
        if name not in defaults:
            raise ValueError(f"options: {config.system} has no {name!r}; there are: {', '.join(defaults) or 'none'}")
    return {**defaults, **config.options}
