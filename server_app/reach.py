"""Where a transport's messages go, and whose key a node has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server_app.transport import FlowerTransport, Transport


def leaves_machine(transport: Transport) -> bool:
    """Whether what is sent leaves the server's process and Flower's simulation.

    Args:
        transport: a run's.

    Returns:
        False for clients in this process and in a simulation, which hold nothing afterwards.
    """
    return isinstance(transport, FlowerTransport) and not (
        transport.simulated or type(transport.grid).__name__ == "InMemoryGrid"
    )


def registered_name(transport: Transport, node: int) -> str:
    """The name under which a node's key was registered with the SuperLink.

    Args:
        transport: a run's.
        node: the node's id.

    Returns:
        What `flwr supernode register KEY --name NAME` was given; empty where there is no such key,
        or its name was left out.
    """
    if not isinstance(transport, FlowerTransport):
        return ""
    nodes: Iterable[Any] = getattr(transport.grid, "get_nodes", tuple)()
    return next((n.name for n in nodes if n.node_id == node), "") or ""
