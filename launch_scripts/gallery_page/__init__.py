"""The gallery of runs and the preference study: reading runs, writing the pages, tallying results. `gallery.py` is the command line.

`static/` holds the pages' own HTML, CSS and JavaScript, copied as they are; what differs between galleries is data.js and assets/.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "custom"))
