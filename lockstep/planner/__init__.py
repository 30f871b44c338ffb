"""Which split, on which machines, at what speed: prices from formulas and measured constants, without torch."""
