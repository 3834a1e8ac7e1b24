"""All settings, one pydantic model per room. A recipe is a TOML file; `--room.key value` overrides it.

This room does not import torch, so an unknown setting or a contradiction is reported before torch is loaded.
"""
