"""Pure policies: frozen snapshots in, decisions out. No sockets, no clocks, no torch."""
