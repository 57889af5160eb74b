"""Which graph, partition, algorithm or task does a name mean?

Each of these rooms has one `Table` of kinds. A name is read as
a kind of the table (`ring`), with an argument after a colon where the kind takes one (`erdos-renyi:0.4`);
a kind that an installed package adds by an entry point; or a function of one's own, `file.py:function` or
`module:function`. The options of a function are the parameters of its signature. In a name they follow a
second colon, in order or by name: `mine.py:two_rings:3`, `mine.py:two_rings:bridges=3,far=true`.
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
