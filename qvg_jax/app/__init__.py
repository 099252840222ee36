"""The `qvg` command: jobs that make a video with several caches, and the reports, videos and plans of them.

This is the highest room: it imports the others, and only models import it, for their jobs. Begin with
`model_entry.py`, what a model tells the command, then `job.py`, what is run, and `generate.py`.
"""
