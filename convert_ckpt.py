#!/usr/bin/env python3
"""Checkpoints between Hugging Face and Megatron formats, tensor by tensor; `convert_ckpt.py --help` lists options."""

import sys

# Saving a checkpoint starts a process that imports this file again: nothing may happen outside the guard.
if __name__ == "__main__":
    from mindspeed_llm.cli.convert import main

    sys.exit(main())
