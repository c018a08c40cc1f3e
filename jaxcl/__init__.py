"""jaxcl: data-parallel continual learning in JAX with a distributed rehearsal buffer."""

__version__ = "0.2.0"
