"""Radial Networks (arXiv 2404.04900) in JAX: a pool of layers, a router, one cache, and depth by the token."""
