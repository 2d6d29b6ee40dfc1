"""The only package that imports transformers. Importing it registers this library with transformers' Auto classes."""

from . import auto as auto
