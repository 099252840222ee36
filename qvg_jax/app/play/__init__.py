"""`qvg play`: a walk through a generated world, steered from a web page, block by block.

`walk.py` makes the blocks, `player.py` plays them in time, `server.py` shows them in `page.py`. Only the
last two need NiceGUI (the extra `play`). Begin with `walk.py`.
"""
