"""C for the CPU, built when it is first needed; Triton for the GPU."""
