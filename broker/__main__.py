"""`python -m broker` is `rllink-zmq broker`: it starts that program, for hosts where scripts are not on the path."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["broker"]
    runpy.run_module("rllink_zmq.cli", run_name="__main__", alter_sys=True)
