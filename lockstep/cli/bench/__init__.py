"""`lockstep bench`: workloads, timing and noise accounting. Every result is one JSON line with what it was measured on."""
