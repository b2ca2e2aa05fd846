"""Front doors: each translates one library's events into calls of the manager and decides nothing itself."""
