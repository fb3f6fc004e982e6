"""Judges: score answers from 0 to 10 by a rubric."""
