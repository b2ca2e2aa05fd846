"""The on-disk formats, as FORMAT.md specifies them. No torch; a reader needs nothing else of lastgood."""
