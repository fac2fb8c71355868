"""``python -m merit_fast`` is the command ``merit-fast``."""

from merit_fast.cli.main import main

if __name__ == "__main__":
    main()
