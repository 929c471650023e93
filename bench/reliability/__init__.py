"""What holds when things go wrong: load, faults and change against real server processes.

`python -m bench.reliability NAME` runs one scenario, prints its figures and ends
with `ok`, or with `failed:` and the rule that was broken. Every answer is
checked against the bare network. Speed is reported and never fails a run.
"""
