"""The command line: words become one frozen config and one call; the result becomes an exit code.

The console script calls ``main``. ``commands`` is the table of commands; ``flags`` makes options
of the stages' config records.
"""
