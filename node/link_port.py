"""The port on which a node accepts links."""

from __future__ import annotations

import errno

from swarmd.node.config import ConfigError
from swarmd.node.options import DEFAULT_LINK_PORT
from swarmd.transport.endpoint import Endpoint


async def listen_for_links(endpoint: Endpoint, wanted: int | None) -> int:
    """Accept links on a port: the one wanted, or the default one, or any if that is taken. Returns it.

    Raises ConfigError when it cannot be had.
    """
    try:
        return await endpoint.listen(None, DEFAULT_LINK_PORT if wanted is None else wanted)
    except OSError as error:
        if wanted is None and error.errno in (errno.EADDRINUSE, errno.EACCES):
            return await endpoint.listen(None, 0)
        raise ConfigError(f"{error}; choose another with --port, or 0 for any") from None
