#!/usr/bin/env python3
"""Fine-tuning, full or with low-rank adapters. `python posttrain_gpt.py --help` lists the options."""

import sys

# Saving a checkpoint starts a process that imports this file again: nothing may happen outside the guard.
if __name__ == "__main__":
    from mindspeed_llm.cli.posttrain import main

    sys.exit(main())
