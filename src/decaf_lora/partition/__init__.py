"""Which examples does each agent hold?

Labels in, index arrays out: no data set is touched. Every rule gives each example (or each of the subset `examples`)
to exactly one agent, leaves no agent empty, and is a pure function of its arguments and the seed. `parse` reads the
names of the command line, `KINDS` lists them.

`shots` is the IID set-up of the DeCAF paper (arXiv 2505.21382): 40 a class in all, 4 for each of 10 agents.
The paper does not publish its non-IID rule. `dirichlet` is the usual label skew (Yurochkin et al., ICML 2019,
arXiv 1905.12022: every class is split by proportions of its own); `by_class` is the harshest one.
"""

from .given import Given, Partitioner, as_partition, by_value, named_alike
from .names import KINDS, parse
from .own import Own
from .rules import by_class, dirichlet, few_shot, iid, shots
from .shards import Indices, Partition

__all__ = [
    "KINDS",
    "Given",
    "Indices",
    "Own",
    "Partition",
    "Partitioner",
    "as_partition",
    "by_class",
    "by_value",
    "dirichlet",
    "few_shot",
    "iid",
    "named_alike",
    "parse",
    "shots",
]
