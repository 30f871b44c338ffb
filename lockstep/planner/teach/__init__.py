"""Simulators that teach: each kind of parallelism as a small program whose every number can be checked by hand.

A simulator is a module with `Options` (its settings), `simulate(options)` (a pure function: the same settings give the same
result), `report(result)` (text for a terminal) and `picture(result)` (SVG). `lockstep simulate` runs them; docs/learn/ explains.
"""
