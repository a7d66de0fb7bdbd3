"""The lowered dual forward on the CPU: oneDNN beside the sparse kernels on positions."""
