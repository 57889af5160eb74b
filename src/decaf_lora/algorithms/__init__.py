"""The algorithms: what do agents send, and how do they combine what arrives? One file a rule, its formula on top.

Transforms lie over any rule that gossips: `decaf() | tracking() | int8()`.
"""

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.algorithms.contract import Change, Combined, Round, Rule, Setting, Transform
from decaf_lora.algorithms.inbox import Inbox, average_tensors
from decaf_lora.algorithms.names import KINDS, accepted, check_together, make, spelled
from decaf_lora.algorithms.rules.alternating import alternating
from decaf_lora.algorithms.rules.centralized import centralized
from decaf_lora.algorithms.rules.core import core
from decaf_lora.algorithms.rules.decaf import GAUGES, decaf, decaf_tracked
from decaf_lora.algorithms.rules.dlora import average_factors, dlora, send_factors
from decaf_lora.algorithms.rules.dlora_fa import dlora_fa
from decaf_lora.algorithms.rules.fedadam import fedadam
from decaf_lora.algorithms.rules.fedavg import fedavg
from decaf_lora.algorithms.rules.fedprox import fedprox
from decaf_lora.algorithms.rules.fedsa import fedsa
from decaf_lora.algorithms.rules.flexlora import flexlora
from decaf_lora.algorithms.rules.local import local
from decaf_lora.algorithms.rules.scaffold import scaffold
from decaf_lora.algorithms.transforms.chain import Algorithm, Mixed, State, chain
from decaf_lora.algorithms.transforms.clipped import clipped
from decaf_lora.algorithms.transforms.feedback import feedback
from decaf_lora.algorithms.transforms.int8 import int8
from decaf_lora.algorithms.transforms.outer_momentum import outer_momentum
from decaf_lora.algorithms.transforms.personal_head import personal_head
from decaf_lora.algorithms.transforms.proximal import proximal
from decaf_lora.algorithms.transforms.quasi_global import quasi_global
from decaf_lora.algorithms.transforms.tracking import tracking
from decaf_lora.algorithms.transforms.trimmed import trimmed

__all__ = [
    "GAUGES",
    "KINDS",
    "Adapter",
    "Algorithm",
    "Change",
    "Combined",
    "Inbox",
    "Mixed",
    "Round",
    "Rule",
    "Setting",
    "State",
    "Transform",
    "accepted",
    "alternating",
    "average_factors",
    "average_tensors",
    "centralized",
    "chain",
    "check_together",
    "clipped",
    "core",
    "decaf",
    "decaf_tracked",
    "dlora",
    "dlora_fa",
    "fedadam",
    "fedavg",
    "fedprox",
    "fedsa",
    "feedback",
    "flexlora",
    "int8",
    "local",
    "make",
    "outer_momentum",
    "personal_head",
    "proximal",
    "quasi_global",
    "scaffold",
    "send_factors",
    "spelled",
    "tracking",
    "trimmed",
]
