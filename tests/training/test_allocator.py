import subprocess
import sys

import pytest

WORK = """
import resource, sys, torch
from normfree.training.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep" and not keep_freed_memory():
    print(-1)
    raise SystemExit
for _ in range(30):  # until the heap has grown to what this takes: 4 to 8 blocks, by where they come to lie
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's switch")
@pytest.mark.slow
def test_a_block_that_was_freed_is_not_asked_for_again():
    def faults(arg):
        done = subprocess.run([sys.executable, "-c", WORK, arg], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = faults("keep")
    if kept < 0:
        pytest.skip("this C library has no mallopt")
    assert kept < faults("plain") / 10  # fewer pages than 3 of the 30 blocks have
