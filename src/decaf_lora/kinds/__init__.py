"""Which graph, partition, algorithm or task does a name mean?

Graphs, partitions, algorithms, transforms and tasks have one `Table` of kinds each. A name means one of three things:

- a kind of the table (`ring`), with an argument after a colon if the kind takes one (`erdos-renyi:0.4`);
- a kind that an installed package adds by an entry point;
- a function of the user's, `file.py:function` or `module:function`. Its options are the parameters of its signature.
  They follow a second colon, in order or by name: `mine.py:two_rings:3`, `mine.py:two_rings:bridges=3,far=true`.
"""

from .functions import Function, installed, joined, own_function
from .options import Option, call, checked, described, options
from .table import Found, Kind, Table

__all__ = [
    "Found",
    "Function",
    "Kind",
    "Option",
    "Table",
    "call",
    "checked",
    "described",
    "installed",
    "joined",
    "options",
    "own_function",
]
