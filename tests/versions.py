"""Which graphs tests draw: most of them those of images and vectors, some those of the newest format version."""

EVERYWHERE = 2  # the version that is drawn where a test asks for none
NEWEST = 3
