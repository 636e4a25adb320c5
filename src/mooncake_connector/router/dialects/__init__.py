"""Say what differs between engines, for everything else in the router: one module per engine."""
