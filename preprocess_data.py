#!/usr/bin/env python3
"""Raw data to indexed token files. `python preprocess_data.py --help` lists the options."""

import sys

# Saving a checkpoint starts a process that imports this file again: nothing may happen outside the guard.
if __name__ == "__main__":
    from mindspeed_llm.cli.preprocess import main

    sys.exit(main())
