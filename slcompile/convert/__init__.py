"""Dense weights to factors, all or nothing."""
