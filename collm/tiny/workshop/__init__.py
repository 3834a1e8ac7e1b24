"""Makes the tiny model: texts of scripted players, a tokenizer, pre-training. No other room imports this one."""
