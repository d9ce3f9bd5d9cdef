"""Recipes: YAML files of training options, chosen with `--recipe NAME`."""
