"""The command line. Settings are parsed before torch is imported."""
