"""`python -m raypipe` is the console command."""

import sys

from raypipe.cli import main

sys.exit(main())
