"""Named ranges, recording a trace, and the report of how much communication hides.

`report.py` imports neither torch nor the rest of the package. May import: compat.
"""
