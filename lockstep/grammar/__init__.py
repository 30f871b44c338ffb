"""Structured outputs as grammars: what bounds them, how they are compiled, how a matcher follows a text. Torch-free; llguidance inside."""
