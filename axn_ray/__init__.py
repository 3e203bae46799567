"""axn-ray: adaptive k-nearest-neighbour search with cross-encoders on Ray."""

__version__ = "0.1.0"
