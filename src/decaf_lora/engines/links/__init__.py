"""Links over the network: one gRPC stream with mutual TLS for each edge of the graph (`decaf-lora[mesh]`)."""

from decaf_lora.extras import missing

try:
    from decaf_lora.engines.links.edge import Neighbour, Status, Timing
    from decaf_lora.engines.links.links import Links
except ImportError as error:
    raise missing(error) or error from error

__all__ = ["Links", "Neighbour", "Status", "Timing"]
