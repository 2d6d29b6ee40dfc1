"""Measurements of ``inplace-ttt bench``: ours, without TTT, the materialised formula and the arithmetic limit.

A module is a subject: ``measure`` returns a record, ``table`` its columns and rows to print.
"""
