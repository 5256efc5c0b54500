"""HTTP endpoints of ARES on top of upstream's server."""
