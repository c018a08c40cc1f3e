"""jaxcl: data-parallel continual learning in JAX with a distributed rehearsal buffer."""

__version__ = "0.1.0"
