"""The command line: words become one frozen config and one call; the result becomes text and an exit code.

Only the console script calls it. ``main`` lists the commands, ``flags`` makes their options from config dataclasses.
"""
