"""The engine without its ranks: the real scheduler under a virtual clock, and what this machine's kernels cost."""
