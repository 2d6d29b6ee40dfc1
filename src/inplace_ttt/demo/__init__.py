"""The demo: read one file with updates on and off, and compare."""
