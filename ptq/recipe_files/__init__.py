"""Recipes from YAML files: read safely, with file and line in every refusal."""
