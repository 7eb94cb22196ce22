"""The broker: one small process between many simulators and a pool of runners. It never opens a payload."""
