"""Our stages and pairs under the pipeline runtimes of other libraries; import the one you use.

May import: every other room.
"""
