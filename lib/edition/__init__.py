"""Turns results of `residual` into the book: chapters with parameters, their tables and figures, and the plan."""
