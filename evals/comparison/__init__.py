"""Paired comparison of records: alignment, differences, intervals, conclusions in words."""
