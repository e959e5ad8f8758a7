"""Chaos: kill anything, and see that nothing is lost, nothing counted twice, and nobody needed.

python jobs/chaos.py [--quick] [--seed N] [--kills 200]   a real federation, its processes killed by a seeded schedule
python jobs/chaos.py --pure 10000 [--seed N]              random histories, with a death at every write position
python jobs/chaos.py --planted                            bugs planted one at a time: do the checks find them?

The last line is the verdict; exit code 1 if anything was violated or not found.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

for place in (Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent):
    sys.path.insert(0, str(place))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two or three minutes, nine kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=200, help="that the long run must have seen, else it has failed")
    parser.add_argument("--pure", type=int, metavar="HISTORIES")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.pure:
        from chaos_pure import report

        well = report(options.seed, options.pure, options.workers)
    elif options.planted:
        from chaos_planted import report as planted

        well = planted(options.workers)
    else:
        from chaos_real import report as real

        well = real(options.seed, kills=options.kills, quick=options.quick)
    print("chaos: all is well" if well else "chaos: VIOLATED")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
