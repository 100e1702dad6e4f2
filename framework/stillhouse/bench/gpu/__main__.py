"""`python -m stillhouse.bench.gpu`."""

from stillhouse.bench.gpu.session import main

raise SystemExit(main())
