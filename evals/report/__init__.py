"""The HTML report page and its figures."""
