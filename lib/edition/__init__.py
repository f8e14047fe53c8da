"""Turns results of `residual` into the book: chapters with parameters, their tables and figures, and the plan."""

import sys

# None makes its import fail: jsonschema takes a second to load it, for a check of addresses that nothing here needs.
sys.modules.setdefault("rfc3987_syntax", None)
