"""The mesh: agents on machines of their own that talk to their neighbours alone.

engine.py is the engine of one agent, peer.py the protocol, link.py what the protocol asks of a transport.
"""
