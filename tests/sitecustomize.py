"""What each Python that a test starts does first: Ray's workers, commands and servers find this
directory on their PYTHONPATH.

The collector comes after 10,000 new objects and not after 700, or it takes an eighth of the time
of imports, which make half a million objects and no garbage. Python imports it by this name.
"""

import gc

gc.set_threshold(10_000)
