"""`mnist-grpc bench`: load for a server, and figures that hold.

Every answer is checked, latency counts from when a message was meant to be
sent, and the generator's own ceiling stands beside what it measures. Not part
of the SDK's interface.
"""
