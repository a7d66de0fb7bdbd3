"""The lowered dual forward on a GPU: each layer of all models together, in one CUDA graph."""
