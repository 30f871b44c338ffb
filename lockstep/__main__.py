"""`python -m lockstep`: the same as the `lockstep` command."""

import sys

from lockstep.cli.entry import main

sys.exit(main())
