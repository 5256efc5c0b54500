"""Who may speak to the control sockets, and what they let in."""
