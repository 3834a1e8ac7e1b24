"""Makes the tiny model: scripted players' texts, a tokenizer, pre-training. Nothing else of the package imports this."""
