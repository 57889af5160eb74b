"""Links over the network: one stream of gRPC with mutual TLS for each edge of the graph (`decaf-lora[mesh]`)."""

from decaf_lora.engines.links.edge import Neighbour, Status, Timing
from decaf_lora.engines.links.links import Links

__all__ = ["Links", "Neighbour", "Status", "Timing"]
