"""LaVIT in the tools people already use: one thin adapter a file, in that tool's own form.

Nothing of this package imports them, and each imports its framework.
"""
