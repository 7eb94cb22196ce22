"""`python -m rllink_zmq.cli` is `rllink-zmq`."""

from rllink_zmq.cli import main

if __name__ == "__main__":
    main(prog_name="rllink-zmq")
