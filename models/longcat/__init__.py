"""LongCat-Video: long video by segments, with a condition cache that may be compressed."""
