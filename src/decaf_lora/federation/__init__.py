"""How do organisations train one model together, each with its own data, without a server? Federations.

`keys` makes and reads keys, `file` is the signed federation file, `dialling` says who calls whom, `commands` is
`decaf federation`. The package needs the extra `decaf-lora[mesh]`.
"""

import decaf_lora.engines.links  # noqa: F401 - says in one line what to install, if the extra is missing
