"""Every setting, one model per room. A recipe is a TOML file, `--room.key value` overrides it, contradictions are refused.

Nothing here imports torch, so a mistyped setting is reported before anything heavy is loaded.
"""
