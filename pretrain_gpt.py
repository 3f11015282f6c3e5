#!/usr/bin/env python3
"""Pre-training from scratch or from a checkpoint. `python pretrain_gpt.py --help` lists the options."""

import sys

# Saving a checkpoint starts a process that imports this file again: nothing may happen outside the guard.
if __name__ == "__main__":
    from mindspeed_llm.cli.pretrain import main

    sys.exit(main())
