"""Support for transformers models. Importing it registers this library's directories with the Auto classes."""

from . import auto as auto
