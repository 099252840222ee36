"""A walk through a generated world in a web page."""
