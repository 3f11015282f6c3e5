#!/usr/bin/env python3
"""Answers and chat from a trained or tuned model. `python inference.py --help` lists the options."""

import sys

# Saving a checkpoint starts a process that imports this file again: nothing may happen outside the guard.
if __name__ == "__main__":
    from mindspeed_llm.cli.inference import main

    sys.exit(main())
