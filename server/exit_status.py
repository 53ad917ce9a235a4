"""Exit statuses of a command that a signal has ended, as a shell reports them: 128 and the signal's number."""

INTERRUPTED = 130
"""SIGINT, that is, Ctrl-C."""
BROKEN_PIPE = 141
"""SIGPIPE: the reader of the output has left."""
