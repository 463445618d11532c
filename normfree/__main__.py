from normfree.cli import main

raise SystemExit(main())
