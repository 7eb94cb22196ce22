"""The learner's side: the only place that imports ray and torch.

`attach(config, broker)` is all that a script needs.
"""

from rllink_zmq.rllib.attach import attach
from rllink_zmq.rllib.runner import ZmqEnvRunner

__all__ = ["ZmqEnvRunner", "attach"]
