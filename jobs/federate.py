"""The main job: one federated model from private images.

python jobs/federate.py [configs/quickstart.yaml] [--set key=value ...] [--address HOST:PORT]
ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/federate.py configs/quickstart.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone or a job's working directory

from raypipe.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
