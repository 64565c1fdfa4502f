"""An output in transformers and PEFT: packed modules, the adapter, and what guards both."""
