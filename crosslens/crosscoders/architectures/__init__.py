"""The architectures, one module each: gate, config and loss, and the declaration `ARCHITECTURE` at its end.

Every module of this folder is found by `crosslens.crosscoders.registration`; nothing else needs to name it.
"""
