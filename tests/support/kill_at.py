"""python kill_at.py PATTERN COUNT ARGUMENTS...: runs merit-fast and kills -9 itself in the middle of a stage: when the
COUNT-th file or directory whose path holds PATTERN (or ends with it, for PATTERN$) is about to get its final name."""

import os
import signal
import sys

pattern, left = sys.argv[1], int(sys.argv[2])


def killing(rename):
    def wrapper(source, target, *args, **kwargs):
        global left
        if str(target).endswith(pattern[:-1]) if pattern.endswith("$") else pattern in str(target):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *args, **kwargs)

    return wrapper


os.replace, os.rename = killing(os.replace), killing(os.rename)
sys.argv = ["merit-fast", *sys.argv[3:]]

from merit_fast.cli.main import main  # noqa: E402

main()
