"""Tells refusals from compliance by rules, and measures how well."""
