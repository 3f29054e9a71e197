"""`megasp pretrain` for launchers: torchrun --nproc-per-node 8 pretrain_gpt.py --model llama3-8b ..."""

import sys

from megasp.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
