"""An OpenAI-compatible HTTP server whose sessions keep learning.

``engine`` holds the sessions and is the library's side: no web framework in it. ``app`` puts it on HTTP.
"""
