"""Placing experts: EPLB greedy and improved, search, measures, load, report.

May import: nothing outside of this room.
"""
