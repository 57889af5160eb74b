"""Federations: organisations that train one model together, each with its own data, without a server.

`keys` makes and reads keys, `file` is the signed federation file, `dialling` says who calls whom, `commands` is
`decaf federation`. The package needs the extra `decaf-lora[mesh]`.
"""
