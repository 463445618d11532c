"""`python -m normfree`: the same as the command `normfree`."""

from normfree.cli import main

raise SystemExit(main())
