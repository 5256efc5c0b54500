"""The runtime: managers, migration, policies and platform, laid out as upstream's ``srt``."""
