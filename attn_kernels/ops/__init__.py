"""The fused operators, one file each: kernels, launchers, registration, autograd Function, public function."""
