"""Tests of `ptq.recipe_files`."""
