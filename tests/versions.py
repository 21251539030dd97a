"""ONNX files hold less than the newest format version, which all else reads.

Where all are the same again this file, and what uses it, is not needed any more.
"""

EVERYWHERE = 2  # the newest version that every part of the project knows
NEWEST = 3
