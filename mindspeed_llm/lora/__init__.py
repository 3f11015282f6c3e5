"""Low-rank adapters: injected into a built model, saved alone, merged, exchanged with PEFT."""
