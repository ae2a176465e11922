"""Recipes that rebuild what the package ships."""
