"""The only folder that knows transformers. With any module of it come the entries for transformers' Auto classes."""

from . import auto as auto
