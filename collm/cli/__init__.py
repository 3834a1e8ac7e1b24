"""The command line: settings are parsed first, torch is imported after."""
