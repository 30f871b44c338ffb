"""Every kernel's operation in plain torch: what the kernels are tested against."""
