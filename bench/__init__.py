"""How fast the service is, beside anchors measured in the same run; docs/performance.md has the goals.

`python -m bench` starts our server with each transport, and a server that does
nothing but answer, each as a process of its own, sends all the same load in
turn, and runs the bare network too. The ratios carry from machine to machine
and from a busy hour to a quiet one; the absolute figures do not. Every answer's
digits are checked.

`python -m bench.messages` times the making and reading of the messages alone.
"""
