"""Laws that hold for any input, tried by hypothesis: the same inputs in every run of the same tests, and no time limit.

`NORMFREE_EXAMPLES=1000 python -m pytest tests/properties` tries more and other inputs of each, and so does
`python -m reliability properties`, which counts.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "normfree",
    max_examples=int(os.environ.get("NORMFREE_EXAMPLES", "25")),
    derandomize="NORMFREE_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],  # they measure time
)
settings.load_profile("normfree")
