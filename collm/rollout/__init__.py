"""Playing episodes: plans, protocols, collection and replay."""
