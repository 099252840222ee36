"""HY-WorldPlay on Wan2.2-TI2V-5B: a world to walk through, its memory compressed or not."""
