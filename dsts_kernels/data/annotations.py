"""Diving48 and FineGym as they are published: annotation files and a folder of videos in, one record a clip out.

Files are checked entry by entry, and an error names the file and the entry. A video that is not in the folder is no
error here (copies of both data sets are incomplete): its clip keeps the path where the video should be, and
:class:`~dsts_kernels.data.clips.VideoClips` leaves it out and says so.
"""

from .diving48 import read_diving48
from .finegym import read_finegym
from .records import Annotations, Clip

__all__ = ["Annotations", "Clip", "read_diving48", "read_finegym"]
