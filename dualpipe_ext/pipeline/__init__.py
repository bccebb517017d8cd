"""Schedules, their simulation and drawing, and the runtime that runs them over ranks.

`schedule.py`, `simulate.py` and `draw.py` need no torch. May import: blocks, and what they may.
"""
