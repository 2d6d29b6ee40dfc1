"""Measurements of ``inplace-ttt bench``: ours, without TTT, the materialised formula and the arithmetic limit."""
