"""Version of the library, for the package, its metadata and its records."""

__version__ = "0.2.0"
