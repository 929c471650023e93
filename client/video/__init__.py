"""Read the handwritten digits in videos and from cameras.

    import client
    from client.video import read_video

    with client.Client() as digits:
        for frame in read_video("clip.mp4", client=digits):
            print(frame.seconds, [(digit.track, digit.digit, digit.box) for digit in frame.digits])

`pip install 'mnist-grpc[video]'` brings what reads and writes files; importing
this package loads none of it. `find_digits` needs nothing but the base install.
"""

from client.video.boxes import Box
from client.video.errors import InvalidVideoError, MissingExtraError
from client.video.finding import Candidate, find_digits
from client.video.reader import VideoFrame, VideoReader, read_video
from client.video.tracking import Digit, Sighting, Smoothing, Tracker

__all__ = [
    "Box",
    "Candidate",
    "Digit",
    "InvalidVideoError",
    "MissingExtraError",
    "Sighting",
    "Smoothing",
    "Tracker",
    "VideoFrame",
    "VideoReader",
    "find_digits",
    "read_video",
]
