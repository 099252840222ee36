"""Video models: a folder for each, what they share in `common` (networks) and `runs` (jobs), and the registry."""
