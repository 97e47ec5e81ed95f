"""The HTTP service: its web page."""
